"""Everything is read from settings.ini; this file only hands it to setuptools."""
import configparser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = configparser.ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

suffix = "_requirements"
extras = {key.removesuffix(suffix): cfg[key].split() for key in cfg if key.endswith(suffix)}
python_versions = [f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers", "Natural Language :: English",
                 *python_versions],
    packages=find_packages(include=["data_io_nbdev", "data_io_nbdev.*"]),
    package_data={"data_io_nbdev": ["py.typed"]},
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
                  "console_scripts": [cfg["console_scripts"]]},
    zip_safe=False,
)
