r"""Write course_lib/recipe_keys.toml: the keys that LLaMA-Factory's and Axolotl's recipes may have, from their packages.

    pip download --no-deps --dest packages llamafactory axolotl transformers==5.6.0
    python -m data.build.recipe_keys packages/llamafactory-*.whl packages/axolotl-*.whl \
        --transformers packages/transformers-5.6.0-*.whl

Nothing of the packages is imported; the classes are read with ast. LLaMA-Factory also knows every field of transformers'
Seq2SeqTrainingArguments; those are looked up in the installed transformers when a recipe is checked. Give --transformers
the newest release that LLaMA-Factory allows (its METADATA tells): what that one knows and the installed one has dropped
is stored, so that recipes written for it are not refused.
"""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "course_lib" / "recipe_keys.toml"
HEADER = """\
# What LLaMA-Factory and Axolotl let a recipe say, read from their published packages by data/build/recipe_keys.py:
# do not edit. Names only; the packages are under the licence that stands beside their version.
"""


@dataclass(frozen=True)
class Declared:
    """One class as its source declares it: the names of its bases, and its fields with their annotations."""

    bases: tuple[str, ...]
    fields: dict[str, ast.expr]


class Package:
    """A downloaded wheel, read and never imported."""

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path)
        self.names = self.archive.namelist()
        self.metadata = self.read(next(name for name in self.names if name.endswith(".dist-info/METADATA")))
        self.version = re.search(r"^Version: (.+)$", self.metadata, re.M)[1]

    def read(self, name: str) -> str:
        """Return one file's text."""
        return self.archive.read(name).decode("utf-8")

    def licence(self) -> str:
        """Return the licence's SPDX name, from the metadata or else from the licence's own first lines."""
        if told := re.search(r"^License-Expression: (.+)$", self.metadata, re.M):
            return told[1]
        text = self.read(next(name for name in self.names if re.search(r"\.dist-info/.*LICENSE$", name)))
        if not re.search(r"Apache License\s+Version 2\.0", text):
            raise SystemExit("the licence is not Apache 2.0 any more: look at it, then mend this script")
        return "Apache-2.0"

    def trees(self, pattern: str) -> dict[str, ast.Module]:
        """Return the parsed files whose names match."""
        return {name: ast.parse(self.read(name)) for name in self.names if re.fullmatch(pattern, name)}

    def classes(self, pattern: str) -> dict[str, Declared]:
        """Return the classes of the files whose names match."""
        nodes = [node for tree in self.trees(pattern).values() for node in ast.walk(tree)]
        return {node.name: _declared(node) for node in nodes if isinstance(node, ast.ClassDef)}


def _declared(node: ast.ClassDef) -> Declared:
    found = {}
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or "ClassVar" in ast.unparse(line.annotation):
            continue
        words = {word.arg: word.value for word in getattr(line.value, "keywords", [])}
        if isinstance(words.get("init"), ast.Constant) and words["init"].value is False:
            continue  # derived, not to be set
        aliases = [words[name] for name in ("alias", "validation_alias") if name in words]
        strings = [part.value for alias in aliases for part in ast.walk(alias) if isinstance(part, ast.Constant)]
        found |= dict.fromkeys([line.target.id, *strings], line.annotation)
    return Declared(tuple(ast.unparse(base) for base in node.bases), found)


def keys_of(name: str, classes: dict[str, Declared]) -> set[str]:
    """Return the fields of a class and of the bases that are known."""
    if name not in classes:
        return set()
    own = {field for field in classes[name].fields if not field.startswith("_")}
    return own.union(*(keys_of(base, classes) for base in classes[name].bases))


def llama_factory(package: Package, allowed: Package | None) -> dict:
    """Return LLaMA-Factory's table: the fields of the dataclasses that its parser fills for training."""
    classes = package.classes(r"llamafactory/hparams/\w+\.py")
    parser = ast.parse(package.read("llamafactory/hparams/parser.py"))
    lists = [node.value for node in parser.body if isinstance(node, ast.Assign) and node.targets[0].id == "_TRAIN_ARGS"]
    names = [element.id for element in lists[0].elts]
    return {
        "name": "LLaMA-Factory",
        "version": package.version,
        "licence": package.licence(),
        "read_from": f"llamafactory/hparams: {', '.join(names)}",
        "keys": set().union(*(keys_of(name, classes) for name in names)),
        "dropped_by_transformers": _dropped(allowed) if allowed else set(),
    }


def _dropped(allowed: Package) -> set[str]:
    from transformers import Seq2SeqTrainingArguments

    old = keys_of("Seq2SeqTrainingArguments", allowed.classes(r"transformers/training_args(_seq2seq)?\.py"))
    return old - {field.name for field in fields(Seq2SeqTrainingArguments)}


def axolotl(package: Package) -> dict:
    """Return Axolotl's table: the schema's fields and aliases, those of a data set's item, and each plugin's own."""
    classes = package.classes(r"axolotl/utils/schemas/\w+\.py")
    root = classes["AxolotlInputConfig"]
    items = [node.id for node in ast.walk(root.fields["datasets"]) if isinstance(node, ast.Name) and node.id in classes]
    return {
        "name": "Axolotl",
        "version": package.version,
        "licence": package.licence(),
        "read_from": f"axolotl/utils/schemas: AxolotlInputConfig and its bases; for datasets {', '.join(sorted(items))}",
        "keys": keys_of("AxolotlInputConfig", classes),
        "datasets": set().union(*(keys_of(item, classes) for item in items)),
        "plugins": plugins(package),
    }


def plugins(package: Package) -> dict[str, set[str]]:
    """Return the keys that each of Axolotl's own plugins adds, by the plugin's class."""
    pattern = r"axolotl/integrations/\w+/\w+\.py"
    classes, found = package.classes(pattern), {}
    for name, tree in package.trees(pattern).items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            made = [part for part in node.body if getattr(part, "name", "") == "get_input_args"]
            told = [part.value for line in made for part in ast.walk(line) if isinstance(part, ast.Constant)]
            arguments = [text.rsplit(".", 1)[1] for text in told if str(text).startswith("axolotl.integrations.")]
            if arguments:
                found[".".join([*name.split("/")[:3], node.name])] = keys_of(arguments[0], classes)
    return found


def table(name: str, content: dict) -> str:
    """Return one table in TOML, lists wrapped at 120 columns."""
    lines = [f"\n[{name}]"]
    for key, value in content.items():
        if isinstance(value, dict):
            lines.append(table(f"{name}.{key}", value))
        elif isinstance(value, str):
            lines.append(f'{key} = "{value}"')
        else:
            names = ", ".join(f'"{each}"' for each in sorted(value))
            wrapped = textwrap.fill(names, 120, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            label = f'"{key}"' if "." in key else key
            lines.append(f"{label} = [\n{wrapped},\n]" if value else f"{label} = []")
    return "\n".join(lines)


def main() -> None:
    """Read the packages and write the keys."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llamafactory", type=Path, help="LLaMA-Factory's wheel")
    parser.add_argument("axolotl", type=Path, help="Axolotl's wheel")
    parser.add_argument("--transformers", type=Path, help="wheel of the newest transformers that LLaMA-Factory allows")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    allowed = Package(options.transformers) if options.transformers else None
    tables = {
        "llama-factory": llama_factory(Package(options.llamafactory), allowed),
        "axolotl": axolotl(Package(options.axolotl)),
    }
    text = HEADER + "\n".join(table(name, content) for name, content in tables.items()) + "\n"
    options.out.write_text(text, encoding="utf-8")
    for name, content in tables.items():
        print(f"{name} {content['version']}: {len(content['keys'])} keys")


if __name__ == "__main__":
    main()
