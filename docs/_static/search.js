// Search as one types. MiniSearch and the documents are loaded when the field is first used; without them the form is Sphinx's own.
const WEIGHTS = { page: 2, class: 2.2, symbol: 1.4, section: 1, inherited: 0.4 };
const words = (text) => text.replace(/time stamp/gi, "timestamp").split(/[\s\p{P}\p{S}]+/u).filter(Boolean);
const plain = (text) => text.toLowerCase().replace(/\(\)$/, "").trim();

// One word of documents, told apart by what it is: where one looks first is said by WEIGHTS, and a name in full comes before all.
function makeSearch(MiniSearch, documents) {
  const index = new MiniSearch({
    idField: "url", fields: ["title", "name", "page", "text"], tokenize: words, storeFields: ["title", "name", "page", "url", "kind", "text"],
    searchOptions: {
      boost: { title: 5, name: 4, page: 1.5 }, prefix: (word) => word.length > 1, fuzzy: (word) => (word.length > 4 ? 0.15 : 0), combineWith: "AND",
      boostDocument: (id, term, stored) => WEIGHTS[stored.kind] * (/^(reference\/)?testing\//.test(stored.url) ? 0.05 : 1),
    },
  });
  index.addAll(documents);
  return (query) => {
    let hits = index.search(query);
    if (!hits.length) hits = index.search(query, { combineWith: "OR" });
    const asked = plain(query);
    const exact = (hit) => (plain(hit.title) === asked ? 3 : hit.name && plain(hit.name) === asked ? 1.5 : 1);
    return hits.map((hit) => ({ ...hit, score: hit.score * exact(hit) })).sort((a, b) => b.score - a.score);
  };
}

function loaded(src) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    Object.assign(script, { src, onload: resolve, onerror: reject });
    document.head.append(script);
  });
}

// The words before and behind the first that was asked for
function excerpt(text, terms, around = 60) {
  const at = Math.max(0, terms.map((term) => text.toLowerCase().indexOf(term)).find((i) => i >= 0) ?? 0);
  const from = at > around ? text.lastIndexOf(" ", at - around) + 1 : 0;
  return `${from ? "…" : ""}${text.slice(from, at + 2 * around)}${text.length > at + 2 * around ? "…" : ""}`;
}

function setUpField(form, root) {
  const input = form.querySelector("input[name=q]");
  const list = Object.assign(document.createElement("ul"), { className: "site-search", id: `site-search-${document.querySelectorAll(".site-search").length}` });
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "Hits");
  form.after(list);
  for (const [name, value] of Object.entries({ role: "combobox", "aria-expanded": "false", "aria-controls": list.id })) input.setAttribute(name, value);
  let ready, search, at = -1;

  const load = () => (ready ??= Promise.all([loaded(`${root}_static/minisearch.js`), loaded(`${root}_static/search-documents.js`)])
    .then(() => { search = makeSearch(MiniSearch, searchDocuments); show(); }, () => {}));

  function item(hit, i) {
    const li = document.createElement("li"), a = document.createElement("a"), title = document.createElement("b"), text = document.createElement("span");
    Object.assign(li, { id: `${list.id}-${i}` }).setAttribute("role", "option");
    a.href = `${root}${hit.url}`;
    title.textContent = hit.title;
    text.textContent = [hit.kind === "section" ? hit.page : "", excerpt(hit.text, hit.terms)].filter(Boolean).join(": ");
    a.append(title, text);
    li.append(a);
    return li;
  }

  function show() {
    if (!search) return;
    const hits = input.value.trim() ? search(input.value).slice(0, 12) : [];
    at = -1;
    list.replaceChildren(...hits.map(item));
    input.setAttribute("aria-expanded", String(hits.length > 0));
    input.removeAttribute("aria-activedescendant");
  }

  function move(step) {
    const items = [...list.children];
    if (!items.length) return;
    at = (at + step + items.length) % items.length;
    items.forEach((li, i) => li.setAttribute("aria-selected", String(i === at)));
    items[at].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", items[at].id);
  }

  input.addEventListener("focus", load);
  input.addEventListener("input", () => { load(); show(); });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); move(event.key === "ArrowDown" ? 1 : -1); }
  });
  form.addEventListener("submit", (event) => {
    const hit = list.children[Math.max(at, 0)];
    if (!hit) return;
    event.preventDefault();
    hit.querySelector("a").click();
  });
  list.addEventListener("click", () => form.closest("dialog")?.close());
}

if (typeof document === "undefined") module.exports = { makeSearch };
else for (const form of document.querySelectorAll("form.bd-search")) setUpField(form, document.documentElement.dataset.content_root);
