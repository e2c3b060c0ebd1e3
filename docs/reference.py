"""The reference: a page for each class that users call, with all its methods, made from what `show_doc` would print.

Nothing is listed by hand: the public names are those of the package, what their methods return, and what nothing else calls in
the modules that are imported by name. Sphinx's Python domain makes anchors, the index and objects.inv of them.
"""
from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Iterator

from bridge import as_called, callouts, doclinks, link_targets, markdown_cell
from nbdev.config import get_config
from sphinx.addnodes import pending_xref

PACKAGE = get_config().lib_path.name
SPECIAL = {"__len__", "__getitem__", "__iter__", "__next__", "__contains__", "__call__", "__enter__", "__add__", "__eq__"}

# Folder: title, what is in it, where its names are defined. A name belongs to the first that fits.
AREAS = {
    "pools": ("Pools", "Where episodes are kept: opened, stored into, asked, verified.", "storage.pool"),
    "samplers": ("Samplers", "Which rows make the next batch: the argument `sampler` of a buffer.", ""),
    "buffers": ("Buffers", "What a learner draws from, and what it gets.", "storage.buffer"),
    "data": ("Data", "Episodes, their fields, and the queries that choose among them.", "data"),
    "interop": ("Interop", "Simulators, data sets and data loaders of others.", "interop"),
    "viz": ("Pictures", "What is in a pool, and what a sampler draws, to look at.", "viz"),
    "errors": ("Exceptions", "Every exception that the package raises on purpose.", "errors"),
}
AUTHORS = {
    "backends": ("For authors of back-ends", "What a pool, a buffer or a sampler of your own implements. Whoever only uses them needs none of it.", ""),
    "testing": ("Contract tests", "What every pool and buffer promises, as tests that your own can run, and what these tests are made of.", "testing"),
}
HOOKS = ("storage.pool.pool.PoolBackend", "storage.buffer.view.Home", "storage.buffer.sampler.Sampler")  # what one derives from


# --- which names ---

def found(name: str) -> Any:
    "The object with this full name, without the package's"
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"{PACKAGE}.{module}"), attribute)


def is_ours(thing: Any) -> bool: return getattr(thing, "__module__", "").startswith(f"{PACKAGE}.") and not thing.__name__.startswith("_")


def is_written(function: Any) -> bool:
    "Whether the package has its source: not what `@dataclass` makes, or a tuple has"
    return hasattr(function, "__code__") and function.__module__.startswith(PACKAGE) and function.__code__.co_filename != "<string>"


def function_of(member: Any) -> Any:
    "The function behind a method or property"
    for part in ("fget", "func", "__func__"): member = getattr(member, part, None) or member
    unwrapped = inspect.unwrap(member) if callable(member) else member
    return unwrapped if (getattr(unwrapped, "__module__", "") or "").startswith(PACKAGE) else member


def members(kind: type, hooks: bool = False) -> dict[str, Any]:
    "What a class of the package offers, layers and all, in the order of the alphabet; with `hooks`, also what it has for those who derive"
    names = [name for name in dir(kind) if not name.startswith("_") or name in SPECIAL or hooks and name in vars(kind) and not name.startswith("__")]
    there = {name: inspect.getattr_static(kind, name) for name in sorted(names, key=lambda name: (name.startswith("_"), name))}
    return {name: member for name, member in there.items() if is_written(function_of(member))}


def line_of(thing: Any) -> int | None:
    "Where the source of a function or class begins; none where it has no source"
    module = sys.modules[thing.__module__]
    if getattr(getattr(thing, "__code__", None), "co_filename", None) == module.__file__: return thing.__code__.co_firstlineno
    lines = inspect.getsource(module).splitlines()
    return next((i for i, line in enumerate(lines, 1) if re.match(rf"(class|def) {thing.__name__}\b", line)), None)


def named_types(function: Any, parameters: bool) -> Iterator[type]:
    "The package's classes in a function's annotations: of its result, or of its parameters, too"
    annotations = {k: v for k, v in getattr(function, "__annotations__", {}).items() if parameters or k == "return"}
    for word in re.findall(r"\w+", str([inspect.formatannotation(a) for a in annotations.values()])):
        if isinstance(kind := getattr(function, "__globals__", {}).get(word), type) and is_ours(kind): yield kind


def entry_points(module: str) -> list[Any]:
    "What users call of a module that they import by name: its errors, or what nothing else in it calls"
    home = import_module(f"{PACKAGE}.{module}")
    tree = ast.parse(inspect.getsource(home))
    called = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    own = [thing for name in home.__all__ if callable(thing := getattr(home, name)) and getattr(thing, "__module__", "") == home.__name__]
    errors = [thing for thing in own if isinstance(thing, type) and issubclass(thing, Exception)]
    return errors or [thing for thing in own if thing.__name__ not in called]


def with_results(things: list[Any]) -> list[Any]:
    "These, and the classes that they and their methods return, and so on"
    known = dict.fromkeys(things)
    for thing in (todo := list(known)):
        functions = map(function_of, members(thing).values()) if isinstance(thing, type) else [thing]
        for kind in (kind for f in functions for kind in named_types(f, parameters=False)):
            if kind not in known:
                known[kind] = None
                todo.append(kind)
    return list(known)


def for_users() -> list[Any]:
    "Functions and classes that users call; what only those who derive from `HOOKS` meet is not for them"
    names, authors = import_module(PACKAGE)._HOME, for_authors()
    symbols = import_module(f"{PACKAGE}._modidx").d["syms"]
    by_name = [module.removeprefix(f"{PACKAGE}.") for module in symbols if module.split(".")[1] in ("interop", "viz", "errors")]
    start = [*(found(f"{module}.{name}") for name, module in names.items()), *(t for m in sorted(by_name) for t in entry_points(m))]
    return [thing for thing in with_results(start) if thing.__name__ in names or thing not in authors]


def for_authors() -> list[type]:
    "The classes that one derives from, and those that their methods speak of"
    hooks = [found(name) for name in HOOKS]
    also = [kind for hook in hooks for member in members(hook, hooks=True).values() for kind in named_types(function_of(member), parameters=True)]
    return list(dict.fromkeys([*hooks, *also]))


def area(thing: Any) -> str:
    "The folder that something belongs to"
    sampler = found("storage.buffer.sampler.Sampler")
    if isinstance(thing, type) and issubclass(thing, sampler): return "samplers"
    home = thing.__module__.removeprefix(f"{PACKAGE}.")
    return next(folder for folder, (_, _, prefix) in AREAS.items() if prefix and home.startswith(prefix))


# --- how they are printed ---

@dataclass
class Printer:
    "Puts symbols into words: where they are explained, and how names in their texts become links"
    urls: dict[str, str]
    labels: set[str]
    titles: dict[str, str]  # Of the notebooks' pages
    targets: dict[str, dict[str, str]] = field(default_factory=dict)
    bodies: dict[Any, str] = field(default_factory=dict)

    def links(self, module: str) -> dict[str, str]:
        "Where names lead on the page of a module"
        page = next((url.split(".html#")[0] for name, url in self.urls.items() if name.startswith(f"{module}.")), "")
        if page not in self.targets: self.targets[page] = link_targets(self.urls, self.labels, set(self.titles), page)
        return self.targets[page]

    @cached_property
    def printed(self) -> type: return import_module(f"{PACKAGE}._showdoc")

    def footer(self, function: Any) -> str:
        "Where something is explained, and its source"
        cfg, full = get_config(), f"{function.__module__}.{function.__qualname__}"
        parts = []
        to = self.links(function.__module__).get(full) or self.links(function.__module__).get(full.rpartition(".")[0])
        if to:
            page = to[1:].split(":")[0].removesuffix(".ipynb")
            parts.append(f"Explained in [{self.titles[page]}]({to})")
        if line := line_of(function):
            file = Path(sys.modules[function.__module__].__file__).relative_to(cfg.lib_path.parent).as_posix()
            parts.append(f"[source]({cfg.git_url}/blob/{cfg.branch}/{file}#L{line})")
        return "```{rst-class} where\n```\n\n" + ", ".join(parts) if parts else ""

    def raised(self, function: Any) -> str:
        "What it raises, as its docstring says since the export"
        said = re.search(r"Raises\n-+\n(.*)", inspect.getdoc(function) or "", re.S)
        entries = re.findall(r"^(\w+)\n((?:    .*\n?)*)", said[1], re.M) if said else []
        return "\n".join(["**Raises**", "", *(f"- `{name}`: {' '.join(text.split())}" for name, text in entries)]) if entries else ""

    def body(self, sym: Any, name: str) -> str:
        "Docstring, parameters, result and errors, as `show_doc` has them, with links; heirs show the same"
        if sym not in self.bodies: self.bodies[sym] = self._body(sym, name)
        return self.bodies[sym]

    def _body(self, sym: Any, name: str) -> str:
        shown, function = self.printed.Signature(sym, name), function_of(sym)
        try: own = {*self.printed.plain_signature(function).parameters, *self.printed.docments(function)}
        except (TypeError, ValueError): own = set()
        targets = {k: v for k, v in self.links(function.__module__).items() if k not in own}
        texts = (shown.doc, shown.table, "" if isinstance(sym, type) else self.raised(function))
        return "\n\n".join([*(doclinks(callouts(text), targets) for text in texts if text), self.footer(function)])

    def brief(self, thing: Any) -> str:
        "Its first line, for a table"
        lines = self.printed.Signature(thing, thing.__name__).doc.strip().split("\n\n")[0].split("\n")
        return doclinks(" ".join(map(str.strip, lines)).replace("|", "\\|"), self.links(thing.__module__))

    def signature(self, sym: Any) -> str:
        "In one line; the domain sets it in as many as it needs"
        try: sig = self.printed.plain_signature(function_of(sym))
        except (TypeError, ValueError): return ""
        if isinstance(sym, type): sig = sig.replace(return_annotation=sig.empty)
        return re.sub(r"\s+", " ", str(sig))

    def entry(self, sym: Any, name: str, inherited: bool = False) -> str:
        "One symbol as a directive of the Python domain"
        function, options = function_of(sym), []
        if isinstance(sym, type): kind = "exception" if issubclass(sym, BaseException) else "class"
        elif isinstance(sym, (property, cached_property)): kind = "property"
        else: kind = "method" if "." in name else "function"
        head = name + ("" if kind == "property" else self.signature(sym))
        if kind == "property" and (gives := self.printed.plain_signature(function).return_annotation) is not inspect.Signature.empty:
            options.append(f":type: {gives}")
        if isinstance(sym, (classmethod, staticmethod)): options.append(f":{type(sym).__name__}:")
        if getattr(function, "__isabstractmethod__", False): options.append(":abstractmethod:")
        lines = [f":::::{{py:{kind}}} {head}", *options, "", self.body(sym, name), ":::::"]
        return "\n".join(["::::::{container} inherited", *lines, "::::::"] if inherited else lines)

    def fields(self, kind: type) -> list[str]:
        "Its public attributes that a comment explains; those that the constructor's table has already get an anchor alone"
        try: told = self.printed.plain_signature(kind).parameters
        except (TypeError, ValueError): told = {}
        notes, entries = self.printed.docments(kind), []
        types = {name: a for base in reversed(kind.__mro__) for name, a in vars(base).get("__annotations__", {}).items()}
        for name, annotation in types.items():
            if name.startswith("_") or name not in notes or name in members(kind): continue
            typed = self.printed._spelled(annotation) if not isinstance(annotation, str) else annotation
            about = ":no-typesetting:" if name in told else f":type: {typed}"
            entries.append("\n".join([f":::::{{py:attribute}} {kind.__name__}.{name}", about, "", notes[name], ":::::"]))
        return entries

    def page(self, kind: type, hooks: bool = False) -> str:
        "The page of a class"
        module = public_module(kind)
        parts = [f"# {kind.__name__}", f"```{{py:currentmodule}} {module}\n```", *imported(kind), self.entry(kind, kind.__name__), *self.fields(kind)]
        for name, member in members(kind, hooks).items():
            parts.append(self.entry(member, f"{kind.__name__}.{name}", inherited=not any(name in vars(k) for k in itself(kind))))
        return "\n\n".join(parts) + "\n"


def itself(kind: type) -> list[type]:
    "A class and the layers that it was built from: the bases of its own module"
    return [base for base in kind.__mro__ if base.__module__ == kind.__module__]


def public_module(thing: Any) -> str: return PACKAGE if thing.__name__ in import_module(PACKAGE)._HOME else thing.__module__


def imported(thing: Any) -> list[str]: return [f"```python\nfrom {public_module(thing)} import {thing.__name__}\n```"]


def full_name(thing: Any) -> str: return f"{public_module(thing)}.{thing.__name__}"


# --- the pages ---

def table(things: list[Any], printer: Printer) -> str:
    rows = [f"| {{py:obj}}`{t.__name__} <{full_name(t)}>` | {printer.brief(t)} |" for t in things]
    return "\n".join(["| name | in a line |", "|---|---|", *rows])


def toctree(names: list[str]) -> str: return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])


def write_area(folder: Path, title: str, about: str, things: list[Any], printer: Printer, hooks: bool = False, pages: bool = True) -> None:
    "The pages of one area, and its own, which has the functions and errors"
    kinds = [t for t in things if pages and isinstance(t, type) and not issubclass(t, Exception)]
    parts = [f"# {title}", about, *([table(kinds, printer)] if kinds else []), *([toctree([k.__name__ for k in kinds])] if kinds else [])]
    module = None
    for thing in (t for t in things if t not in kinds):
        if module != (module := public_module(thing)): parts.append(f"```{{py:currentmodule}} {module}\n```")
        parts.append(printer.entry(thing, thing.__name__))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    for kind in kinds: (folder / f"{kind.__name__}.md").write_text(printer.page(kind, hooks), encoding="utf-8")


def write_reference(sources: Path, titles: dict[str, str], urls: dict[str, str], labels: set[str]) -> None:
    "All pages of the reference, and on top of the section's page an overview"
    printer, parts, users = Printer(urls, labels, titles), [], for_users()
    contents = {name: [t for t in users if area(t) == name] for name in AREAS}
    testing = import_module(f"{PACKAGE}.testing")
    contents |= {"backends": [t for t in for_authors() if t not in users],
                 "testing": [t for name in testing.__all__ if callable(t := getattr(testing, name)) and is_ours(t)]}
    root = sources / "reference"
    for name, (title, about, _) in (AREAS | AUTHORS).items():
        things = sorted(contents[name], key=lambda t: (public_module(t), t.__name__.lower())) if name == "testing" else contents[name]
        write_area(root / name, title, about, things, printer, hooks=name == "backends", pages=name != "testing")
        parts += [f"## [{title}]({name}/index.md)", about, *([table(things, printer)] if name != "testing" else [])]
    index = root / "index.md"
    rest = index.read_text(encoding="utf-8").removeprefix("# Reference\n") if index.exists() else ""
    also = "Every name is in the {ref}`general index <genindex>`, every module in the {ref}`module index <modindex>`."
    head = ["# Reference", "> Every class and function: what it takes, gives and raises", also, toctree([f"{name}/index" for name in AREAS | AUTHORS])]
    index.write_text("\n\n".join([*head, *parts, "## More", rest.strip()]) + "\n", encoding="utf-8")


def mark_module(module: str, description: str) -> dict:
    "A cell that makes a page the place where a module is explained"
    return markdown_cell(f"```{{py:module}} {module}\n:synopsis: {description}\n```")


def only_own_types(app: Any, doctree: Any) -> None:
    "Types of others stay text: Sphinx would lead `dtype` to an attribute of that name"
    for reference in list(doctree.findall(pending_xref)):
        if reference["refdomain"] == "py" and reference["reftype"] == "class" and reference["reftarget"].rpartition(".")[2] not in app.own_types:
            reference.replace_self(reference.children)


def setup(app: Any) -> dict[str, bool]:
    app.own_types = {thing.__name__ for thing in [*for_users(), *for_authors()]}
    app.connect("doctree-read", only_own_types)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
