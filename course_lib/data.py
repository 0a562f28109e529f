"""Load a task's rows from the Hub, a local folder or the bundled set by the same call; tokenise them.

Whatever the source, a task has the same columns (text, label, hard), label names and splits.
"""

from __future__ import annotations

import csv
import gzip
import html
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from course_lib.errors import DataError, HubError
from course_lib.profiles import DATA, Plan

LABELS = {
    "ag_news": ["World", "Sports", "Business", "Sci/Tech"],
    "imdb": ["negative", "positive"],
}
HUB_IDS = {"ag_news": "fancyzhx/ag_news", "imdb": "stanfordnlp/imdb"}
BUNDLED = {"ag_news": "news", "imdb": "reviews"}
SPLITS = ("train", "validation", "test")
MIN_ROWS = 10  # of each class, in the train split


@dataclass(frozen=True)
class Task:
    """A classification task: three `datasets.Dataset` splits with columns text, label and hard.

    ``hard`` is True or False in the bundled sets, whose authors marked it, and None elsewhere. ``source`` says where
    the rows came from.
    """

    name: str
    label_names: list[str]
    source: str
    train: object
    validation: object
    test: object

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, split)):,} {split}" for split in SPLITS)
        return f"{self.name} from {self.source}: {counts}; labels {', '.join(self.label_names)}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"


def load_task(task: str, plan: Plan, data_dir: str = "") -> Task:
    """Return a task's splits, shuffled, balanced between labels as the source is, and cut to the plan's rows. (Week 6, lesson 1.)

    From ``data_dir`` where one is named: a folder with train.csv and test.csv (also .csv.gz; columns text and label;
    validation.csv is optional), or one that `datasets` saved. Else the bundled set on tiny, and the Hub on colab and
    full. Where there is no validation split, rows of the train split become one.

    Raises DataError for an unknown task or an unusable file, HubError where the Hub cannot be reached.
    """
    if task not in LABELS:
        raise DataError(f"unknown task {task!r}; choose one of {', '.join(LABELS)}")
    if data_dir:
        source, splits = f"the folder {data_dir}", _load_folder(Path(data_dir).expanduser(), LABELS[task])
    elif plan.profile == "tiny":
        folder = DATA / BUNDLED[task]
        source, splits = f"this course's own data/{BUNDLED[task]}", _load_folder(folder, LABELS[task])
    else:
        source, splits = f"the Hub's {HUB_IDS[task]}", _load_hub(HUB_IDS[task], LABELS[task])
    _require_all_classes(splits["train"], task, source)
    if "validation" not in splits:
        size = max(len(LABELS[task]), min(plan.validation_rows, len(splits["train"]) // 5))
        halves = splits["train"].train_test_split(test_size=size, seed=0, stratify_by_column="label")
        splits = {**splits, "train": halves["train"], "validation": halves["test"]}
    rows = {"train": plan.train_rows, "validation": plan.validation_rows, "test": plan.test_rows}
    return Task(task, LABELS[task], source, **{split: _cut(splits[split], rows[split]) for split in SPLITS})


def _require_all_classes(train, task: str, source: str) -> None:
    """Raise DataError where a class has too few rows to train, validate and compare on."""
    counts = Counter(train["label"])
    few = {name: counts[number] for number, name in enumerate(LABELS[task]) if counts[number] < MIN_ROWS}
    if not few:
        return
    others = ", ".join(name for name in LABELS if name != task)
    told = ", ".join(f"{count} for {name}" for name, count in few.items())
    hint = f"; is TASK = {task!r} the right task for it? The others are {others}" if 0 in few.values() else ""
    raise DataError(f"{source} has too few training rows: {told}, and at least {MIN_ROWS} a class are needed{hint}")


def _cut(split, rows: int):
    """Return at most ``rows`` rows, shuffled; the same rows each time, so that runs can be compared."""
    return split.shuffle(seed=0).select(range(min(rows, len(split))))


def _as_dataset(texts: list[str], labels: list[int], hard: list[bool | None], names: list[str]):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=names), "hard": Value("bool")})
    return Dataset.from_dict({"text": texts, "label": labels, "hard": hard}, features=features)


def _load_folder(folder: Path, names: list[str]) -> dict:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; give DATA_DIR the path of a folder with train.csv and test.csv")
    if (folder / "dataset_dict.json").is_file():
        return _load_saved(folder, names)
    splits = {}
    for split in SPLITS:
        path = next((p for p in (folder / f"{split}.csv", folder / f"{split}.csv.gz") if p.is_file()), None)
        if path is not None:
            splits[split] = read_csv(path, names)
        elif split != "validation":
            raise DataError(f"{folder} has no {split}.csv or {split}.csv.gz; both train and test are needed")
    return splits


def _load_saved(folder: Path, names: list[str]) -> dict:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} looks like a saved data set but does not load: {error}") from error
    if missing := {"train", "test"} - set(saved):
        raise DataError(f"{folder} has no split {', '.join(sorted(missing))}; both train and test are needed")
    return {split: _normalise(saved[split], names, f"{folder}, {split}") for split in SPLITS if split in saved}


def _load_hub(hub_id: str, names: list[str]) -> dict:
    from datasets import load_dataset

    try:
        loaded = load_dataset(hub_id)
    except Exception as error:
        raise HubError(
            f"could not load {hub_id} from the Hub ({type(error).__name__}: {str(error)[:200]}). Check the connection and run "
            "this cell again (finished downloads are kept), or set PROFILE = 'tiny', or DATA_DIR to a folder of your own"
        ) from error
    return {split: _normalise(loaded[split], names, f"{hub_id}, {split}") for split in SPLITS if split in loaded}


def _normalise(split, names: list[str], where: str):
    """Return a loaded split with this course's three columns. Raises DataError as `read_csv` does."""
    from datasets import ClassLabel

    if missing := {"text", "label"} - set(split.column_names):
        raise DataError(f"{where}: no column {', '.join(sorted(missing))}; it has {', '.join(split.column_names)}")
    if len(split) == 0:
        raise DataError(f"{where}: no rows")
    feature, given = split.features["label"], split["label"]
    if isinstance(feature, ClassLabel) and not all(name.isdecimal() for name in feature.names):
        given = [feature.int2str(label) for label in given]  # its own order of names may be another
    labels = [_label_id(label, names, f"{where}, row {row}") for row, label in enumerate(given)]
    hard = split["hard"] if "hard" in split.column_names else [None] * len(labels)
    return _as_dataset(list(split["text"]), labels, list(hard), names)


def read_csv(path: Path, names: list[str]):
    """Return a CSV file (plain or gzipped, UTF-8) as a data set with columns text, label and hard.

    Labels are numbers from 0 or names, in any case; ``hard`` is optional (true or false). Raises DataError with the file
    and line for missing columns, an unknown label, an empty text, no rows, another encoding, or a broken file.
    """
    texts, labels, hard = [], [], []
    try:
        for line, row in _csv_rows(path):
            text = (row["text"] or "").strip()
            if not text:
                raise DataError(f"{path}, line {line}: the text is empty; fill it in or delete the row")
            texts.append(text)
            labels.append(_label_id(row["label"], names, f"{path}, line {line}"))
            hard.append({"true": True, "false": False}.get((row.get("hard") or "").lower()))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it again with that encoding"
        ) from error
    except (csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable CSV file: {error}") from error
    if not texts:
        raise DataError(f"{path} has no rows below its header; is it the right file?")
    return _as_dataset(texts, labels, hard, names)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(10**7)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"text", "label"} - set(reader.fieldnames or ()):
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise DataError(f"{path}: no column {', '.join(sorted(missing))}; its header has {found}")
        for row in reader:
            yield reader.line_num, row


def _label_id(label: object, names: list[str], where: str) -> int:
    text = str(label).strip()
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    for number, name in enumerate(names):
        if text.lower() == name.lower():
            return number
    choices = ", ".join(f"{number} or {name}" for number, name in enumerate(names))
    raise DataError(f"{where}: unknown label {text!r}; a label is {choices}")


def tokenize(split, tokenizer, max_length: int):
    """Return the split with input_ids and attention_mask, cut to ``max_length`` tokens and not yet padded. (Week 6, lesson 1.)"""
    return split.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns=[name for name in split.column_names if name != "label"],
    )


def load_evidence(lesson: str, name: str) -> dict | None:
    """Return a lesson's stored many-seed results, or None where the course's files are not beside the library. (Week 6, lesson 1.)

    They stand in lessons/weekNN/evidence/ as JSON, made by the script of the same name (make evidence).
    """
    path = DATA.parent / "lessons" / Path(lesson).parent / "evidence" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def task_for(task: str, data_dir: str) -> str:
    """Return the task to load: the one asked for; on "auto" the folder's name if it is a task's, else the first. (Week 6, lesson 1.)"""
    if task != "auto":
        return task
    name = Path(data_dir).expanduser().resolve().name if data_dir else ""
    return name if name in LABELS else next(iter(LABELS))


def load_questions(name: str) -> list[dict]:
    """Return the questions of data/conversations/questions_NAME.jsonl, in an order mixed once and for all. (Week 6, lesson 2.)

    "isles" has question, answer (the whole sentence) and value for facts that no conversation asks about; "general" has
    question and value.
    """
    path = DATA / "conversations" / f"questions_{name}.jsonl"
    if not path.is_file():
        raise DataError(f"no questions {name!r}: {path} is not there")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_texts(name: str, count: int = 40) -> list[str]:
    """Return plain texts to measure perplexity on: "isles" tells of the Lantern Isles, "general" is news. (Week 6, lesson 4.)

    All were written for this course, so no model from the Hub has read them. Raises DataError for another name.
    """
    if name == "general":
        return list(read_csv(DATA / "news" / "test.csv", LABELS["ag_news"])["text"])[:count]
    path = DATA / "conversations" / f"told_{name}.jsonl"
    if not path.is_file():
        raise DataError(f"no texts {name!r}; choose isles or general")
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()][:count]


def load_pictures(name: str) -> list[dict]:
    """Return questions about the pictures of data/pictures: dicts with picture (PIL, RGB), question and answer. (Week 6, lesson 3.)

    "shapes" adds kind, other_picture and other_answer, "turquoise" kind and split; "drawings" of things that photographs
    show have accept, other wordings of the answer, and alt, the picture in words. Raises DataError for another name.
    """
    import io

    from PIL import Image

    table, drawings = DATA / "pictures" / f"{name}.parquet", DATA / "pictures" / name / "questions.json"
    if drawings.is_file():
        told = json.loads(drawings.read_text(encoding="utf-8"))
        opened = {file: Image.open(drawings.with_name(file)).convert("RGB") for file in told}
        return [
            {"picture": opened[file], "alt": about["alt"], **asked}
            for file, about in told.items()
            for asked in about["questions"]
        ]
    if not table.is_file():
        raise DataError(f"no pictures {name!r}; choose shapes, turquoise or drawings")
    import pandas as pd

    return [
        {
            key: Image.open(io.BytesIO(value["bytes"])).convert("RGB") if isinstance(value, dict) else value
            for key, value in row.items()
        }
        for row in pd.read_parquet(table).to_dict("records")
    ]
