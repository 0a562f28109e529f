"""Loading a task by one call: bundled, from a folder, saved; and every way in which a file can be wrong."""

import gzip

import pytest
from conftest import LESSON, MACHINES

from course_lib.data import LABELS, load_evidence, load_task, read_csv, task_for, tokenize
from course_lib.errors import DataError, HubError
from course_lib.profiles import make_plan

NEWS = LABELS["ag_news"]
GOOD = "text,label\n" + "".join(f"story {number},{number % 4}\n" for number in range(80))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "test.csv").write_text(GOOD)
    return tmp_path


@pytest.mark.parametrize("task", ["ag_news", "imdb"])
def test_bundled_sets_have_the_same_columns_labels_and_splits_as_any_source(plan, task, folder):
    bundled = load_task(task, plan)
    for split in (bundled.train, bundled.validation, bundled.test):
        assert split.column_names == ["text", "label", "hard"]
        assert split.features["label"].names == LABELS[task]
        assert len(split) > 0
    assert "this course's own" in repr(bundled)


def test_a_folder_gives_the_same_shape_with_a_validation_split_cut_from_train(plan, folder):
    task = load_task("ag_news", plan, str(folder))
    assert task.train.column_names == ["text", "label", "hard"]
    assert (len(task.train), len(task.validation), len(task.test)) == (64, 16, 80)
    assert sorted(task.validation["label"]) == [label for label in range(4) for _ in range(4)]
    assert not set(task.validation["text"]) & set(task.train["text"])
    assert str(folder) in task.source
    assert set(task.test["hard"]) == {None}


def test_rows_are_the_same_every_time_and_cut_to_the_plan(folder):
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], train_rows=10, test_rows=5)
    first, second = load_task("ag_news", plan, str(folder)), load_task("ag_news", plan, str(folder))
    assert list(first.train["text"]) == list(second.train["text"])
    assert (len(first.train), len(first.test)) == (10, 5)


def test_a_gzipped_csv_and_label_names_read_like_a_plain_one(tmp_path):
    with gzip.open(tmp_path / "train.csv.gz", "wt") as file:
        file.write('text,label,hard\n"One, two",sports,true\nThree,Sci/Tech,false\n')
    rows = read_csv(tmp_path / "train.csv.gz", NEWS)
    assert rows["text"][:] == ["One, two", "Three"]
    assert rows["label"][:] == [1, 3]
    assert rows["hard"][:] == [True, False]


def test_a_saved_data_set_loads_like_a_csv(plan, tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {"text": [f"story {number}" for number in range(40)], "label": [number % 4 for number in range(40)]}
    DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows)}).save_to_disk(
        str(tmp_path / "saved")
    )
    task = load_task("ag_news", plan, str(tmp_path / "saved"))
    assert task.train.column_names == ["text", "label", "hard"]
    assert len(task.test) == 40


def test_a_saved_data_set_without_a_test_split_is_refused(plan, tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_dict({"text": ["a"], "label": [0]})}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="no split test"):
        load_task("ag_news", plan, str(tmp_path / "saved"))


def test_a_saved_data_sets_own_order_of_names_is_respected(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    rows = {"text": [f"{word} {n}" for n in range(20) for word in ("fine", "awful")], "label": [0, 1] * 20}
    split = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    plan = make_plan(LESSON, "tiny", task="imdb", hardware=MACHINES["laptop"])
    task = load_task("imdb", plan, str(tmp_path / "saved"))
    assert {(row["text"].split()[0], row["label"]) for row in task.test} == {("fine", 1), ("awful", 0)}


def test_too_few_rows_of_a_class_are_refused_with_their_number(plan, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text(
            "text,label\n" + "".join(f"story {n},{n % 4}\n" for n in range(43 if split == "test" else 39))
        )
    with pytest.raises(DataError, match="9 for Sci/Tech, and at least 10 a class"):
        load_task("ag_news", plan, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"headline,label\nx,1\n", "no column text; its header has headline, label"),
        (b"text,class\nx,1\n", "no column label"),
        (b"text,label\nx,1\ny,Weather\n", r"line 3: unknown label 'Weather'; a label is 0 or World, 1 or Sports"),
        (b"text,label\nx,4\n", "unknown label '4'"),
        (b"text,label\nx,-1\n", "unknown label '-1'"),
        ("text,label\nx,\u00b2\n".encode(), "unknown label"),
        (b"text,label\n", "no rows below its header"),
        (b"", "its header has nothing"),
        (b"text,label\n  ,1\n", "line 2: the text is empty"),
        (b"text,label\nx\n", "unknown label 'None'"),
        ("text,label\ncaf\u00e9,1\n".encode("latin-1"), "not UTF-8"),
        ("text,label\nx,1\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_wrong_csv_is_named_with_the_line_and_the_remedy(tmp_path, content, says):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read_csv(path, NEWS)
    assert str(path) in str(error.value)


def test_a_broken_or_half_written_gzip_is_refused(tmp_path):
    whole = gzip.compress(GOOD.encode())
    spoilt = whole[:30] + bytes(255 - byte for byte in whole[30:60]) + whole[60:]
    for number, content in enumerate((b"not gzip at all", whole[: len(whole) // 2], spoilt)):
        path = tmp_path / f"{number}.csv.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a readable CSV"):
            read_csv(path, NEWS)


def test_a_missing_folder_or_file_says_what_is_needed(plan, tmp_path):
    with pytest.raises(DataError, match="give DATA_DIR the path"):
        load_task("ag_news", plan, str(tmp_path / "nowhere"))
    (tmp_path / "train.csv").write_text(GOOD)
    with pytest.raises(DataError, match=r"no test\.csv"):
        load_task("ag_news", plan, str(tmp_path))


def test_an_unknown_task_names_the_known_ones(plan):
    with pytest.raises(DataError, match="ag_news, imdb"):
        load_task("yelp", plan)


def test_labels_of_another_task_are_noticed(plan, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "".join(f"film {n},{n % 2}\n" for n in range(20)))
    with pytest.raises(DataError, match="is TASK = 'ag_news' the right task"):
        load_task("ag_news", plan, str(tmp_path))
    assert load_task("imdb", plan, str(tmp_path)).label_names == ["negative", "positive"]


def test_auto_takes_the_task_from_the_folders_name(tmp_path):
    assert task_for("auto", "") == "ag_news"
    assert task_for("auto", str(tmp_path / "imdb")) == "imdb"
    assert task_for("auto", str(tmp_path / "letters")) == "ag_news"
    assert task_for("imdb", str(tmp_path / "ag_news")) == "imdb"


def test_a_hub_that_cannot_be_reached_says_what_to_do():
    plan = make_plan(LESSON, "colab", hardware=MACHINES["T4"])
    with pytest.raises(HubError, match=r"could not load fancyzhx/ag_news.*PROFILE = 'tiny'"):
        load_task("ag_news", plan)  # HF_HUB_OFFLINE is set for all tests


def test_tokenised_rows_are_cut_and_keep_their_labels(plan, tiny_bert, folder):
    from transformers import AutoTokenizer

    task = load_task("ag_news", plan, str(folder))
    rows = tokenize(task.test, AutoTokenizer.from_pretrained(str(tiny_bert)), max_length=4)
    assert max(len(ids) for ids in rows["input_ids"]) == 4
    assert list(rows["label"]) == list(task.test["label"])
    assert "text" not in rows.column_names


def test_evidence_that_is_not_there_is_none():
    assert load_evidence(LESSON, "nothing-of-the-kind") is None


def test_real_ag_news_and_imdb_load_from_the_folder_a_student_names(plan, real_data):
    for task in ("ag_news", "imdb"):
        loaded = load_task(task, plan, str(real_data / task))
        assert len(loaded.train) == plan.train_rows
        assert set(loaded.train["label"]) == set(range(len(LABELS[task])))


@pytest.mark.parametrize("profile", ["colab", "full"])
def test_on_a_gpu_profile_the_hubs_data_set_comes_in_the_same_shape(monkeypatch, profile):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    asked = []

    def hub(name):
        asked.append(name)
        features = Features(
            {"text": Value("string"), "label": ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"])}
        )
        rows = {"text": [f"story {n}" for n in range(400)], "label": [n % 4 for n in range(400)]}
        return DatasetDict({split: Dataset.from_dict(rows, features=features) for split in ("train", "test")})

    monkeypatch.setattr("datasets.load_dataset", hub)
    task = load_task("ag_news", make_plan(LESSON, profile, hardware=MACHINES["A100"]))
    assert asked == ["fancyzhx/ag_news"]
    assert task.train.column_names == ["text", "label", "hard"]
    assert (len(task.train), len(task.validation), len(task.test)) == (320, 80, 400)
    assert "the Hub's fancyzhx/ag_news" in repr(task)
