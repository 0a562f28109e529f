"""One dial: which profile a machine gets, what the plan says, what is given up to fit."""

from dataclasses import replace

import pytest
from conftest import LESSON, MACHINES

from course_lib import profiles
from course_lib.errors import ProfileError
from course_lib.hardware import GIB
from course_lib.profiles import PROFILES, choose_profile, lesson_settings, make_plan, model_shape, run_folder


@pytest.mark.parametrize(
    ("machine", "profile"),
    [
        ("laptop", "tiny"),
        ("T4", "colab"),
        ("L4", "colab"),
        ("A100", "full"),
        ("H100", "full"),
        ("small", "colab"),
        ("mac", "colab"),
    ],
)
def test_auto_follows_the_machine(machine, profile):
    assert choose_profile(MACHINES[machine])[0] == profile
    assert make_plan(LESSON, hardware=MACHINES[machine]).profile == profile


@pytest.mark.parametrize("machine", MACHINES)
def test_a_plan_fits_the_memory_that_is_free(machine):
    plan = make_plan(LESSON, hardware=MACHINES[machine])
    assert plan.needed.total <= plan.hardware.free_bytes


def test_a_small_gpu_halves_the_batch_and_accumulates_so_that_steps_stay():
    roomy = make_plan(LESSON, "colab", hardware=MACHINES["T4"])
    tight = make_plan(LESSON, "colab", hardware=replace(MACHINES["T4"], free_bytes=int(3.2 * GIB)))
    assert roomy.accumulation == 1 and roomy.given_up == []
    assert tight.accumulation > 1
    assert tight.batch_size * tight.accumulation == roomy.batch_size
    assert tight.steps == roomy.steps
    assert "accumulated" in tight.given_up[0]


def test_where_no_batch_fits_the_bundled_miniature_takes_over_and_the_plan_says_so():
    plan = make_plan(LESSON, "colab", hardware=replace(MACHINES["T4"], free_bytes=int(1.5 * GIB)))
    assert plan.model == "mini-bert"
    assert "google-bert/bert-base-uncased" in plan.given_up[0]
    assert "mini-bert" in repr(plan)


def test_a_model_brings_its_own_rate_and_the_length_it_can_read():
    named = make_plan(LESSON, "full", task="imdb", hardware=MACHINES["H100"], model="mini-bert")
    assert named.max_length == 256 and named.lr == 5e-4
    fallen = make_plan(LESSON, "full", task="imdb", hardware=replace(MACHINES["H100"], free_bytes=int(1.4 * GIB)))
    assert (fallen.model, fallen.max_length, fallen.lr) == ("mini-bert", 256, 5e-4)
    assert make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model="google-bert/bert-base-uncased").lr == 2e-5
    assert (
        make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model="google-bert/bert-base-uncased", lr=1e-3).lr
        == 1e-3
    )


def test_where_nothing_fits_the_plan_says_so():
    plan = make_plan(LESSON, "tiny", hardware=replace(MACHINES["laptop"], free_bytes=int(0.3 * GIB)))
    assert plan.batch_size == 1 and "nothing fits" in plan.given_up[-1]


def test_a_plan_can_be_told_how_many_rows_there_really_are():
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    fewer = plan.changed(train_rows=160)
    assert (fewer.steps, plan.steps) == (10 * plan.epochs, 38 * plan.epochs)
    with pytest.raises(ProfileError, match="no setting colour"):
        plan.changed(colour=1)


def test_a_plan_shows_the_same_in_text_and_html():
    plan = make_plan(LESSON, hardware=MACHINES["T4"])
    for word in ("Tesla T4", "float16", "no bfloat16", "google-bert/bert-base-uncased", "GiB needed of"):
        assert word in repr(plan)
        assert word in plan._repr_html_()


def test_a_plan_escapes_what_it_shows():
    plan = make_plan(LESSON, "tiny", hardware=replace(MACHINES["laptop"], name="<b>x</b>"))
    assert "<b>x" not in plan._repr_html_()


def test_settings_can_be_replaced_by_name_and_reads_as_attributes():
    plan = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], train_rows=512, epochs=1)
    assert (plan.train_rows, plan.epochs) == (512, 1)
    assert plan.steps == 512 // plan.batch_size
    with pytest.raises(AttributeError, match="no setting 'colour'"):
        plan.colour  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"profile": "huge"}, "auto, tiny, colab, full"),
        ({"task": "yelp"}, "ag_news, imdb"),
        ({"batchsize": 3}, "batch_size"),
        ({"model": "no/such-model"}, "check the spelling"),
    ],
)
def test_a_wrong_choice_names_the_right_ones(arguments, says):
    with pytest.raises(ProfileError, match=says):
        make_plan(LESSON, **{"profile": "tiny", "hardware": MACHINES["laptop"], **arguments})


def test_an_unknown_lesson_names_those_there_are():
    with pytest.raises(ProfileError, match="week06/01_bert_classification"):
        make_plan("week99/nothing", hardware=MACHINES["laptop"])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("task", ["ag_news", "imdb"])
def test_every_profile_has_the_same_settings_for_every_task(profile, task):
    assert set(lesson_settings(LESSON, profile, task)) == set(lesson_settings(LESSON, "tiny", "ag_news"))


def test_a_folder_of_ones_own_brings_its_own_numbers_of_rows():
    bundled = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"])
    own = make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], data_dir="somewhere")
    assert own.train_rows > bundled.train_rows
    assert own.lr == bundled.lr


def test_tiny_plans_exactly_the_bundled_rows():
    from course_lib.data import load_task

    for task in ("ag_news", "imdb"):
        plan = make_plan(LESSON, "tiny", task=task, hardware=MACHINES["laptop"])
        loaded = load_task(task, plan)
        rows = (len(loaded.train), len(loaded.validation), len(loaded.test))
        assert rows == (plan.train_rows, plan.validation_rows, plan.test_rows)


def test_a_folder_that_is_no_encoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ProfileError, match="neither a BERT-like encoder nor a decoder"):
        make_plan(LESSON, "tiny", hardware=MACHINES["laptop"], model=str(tmp_path))


def test_what_a_lesson_writes_goes_where_course_runs_points(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "elsewhere"))
    assert run_folder(LESSON) == tmp_path / "elsewhere" / LESSON
    assert run_folder(LESSON).is_dir()


CHAT = "week06/02_chat_templates"


@pytest.mark.parametrize("machine", MACHINES)
def test_a_chat_plan_fits_the_memory_that_is_free(machine):
    plan = make_plan(CHAT, hardware=MACHINES[machine])
    assert plan.needed.total <= plan.hardware.free_bytes
    assert plan.needed.total == plan.needed.weights + plan.needed.kv_cache + plan.needed.runtime


def test_zephyr_is_in_four_bits_on_a_t4_and_in_sixteen_on_a_large_gpu():
    t4, h100 = (make_plan(CHAT, hardware=MACHINES[machine]) for machine in ("T4", "H100"))
    assert (t4.model, t4.precision, str(t4.dtype)) == ("HuggingFaceH4/zephyr-7b-beta", "nf4", "torch.float16")
    assert (h100.model, h100.precision, str(h100.dtype)) == ("HuggingFaceH4/zephyr-7b-beta", "plain", "torch.bfloat16")
    assert 4 * GIB < t4.needed.total < 6 * GIB and 14 * GIB < h100.needed.total < 16 * GIB
    assert "14.8 GB from the Hub" in repr(t4) and "NF4" in repr(t4) and "16 bits a weight" in repr(h100)


def test_sixteen_bits_that_do_not_fit_become_four_and_then_the_miniature():
    tight = make_plan(CHAT, "full", hardware=replace(MACHINES["A100"], free_bytes=10 * GIB))
    assert tight.precision == "nf4" and "NF4 instead" in tight.given_up[0]
    tiny = make_plan(CHAT, "colab", hardware=MACHINES["small"])
    assert (tiny.model, tiny.base_model, tiny.questions) == ("mini-zephyr-chat", "mini-zephyr", "isles")
    assert "HuggingFaceH4/zephyr-7b-beta" in tiny.given_up[0]
    apple = make_plan(CHAT, "colab", hardware=MACHINES["mac"])
    assert apple.precision == "plain" and "bitsandbytes" in apple.given_up[0]


def test_a_disk_without_room_for_the_download_is_noticed_before_it_starts(monkeypatch):
    monkeypatch.setattr(profiles, "_cache_free_bytes", lambda: 5_000_000_000)
    plan = make_plan(CHAT, hardware=MACHINES["H100"])
    assert plan.model == "mini-zephyr-chat" and "14.5 GB of disk" in plan.given_up[0]
    assert "nothing: both models are here" in repr(plan)


def test_the_miniature_needs_no_download_and_reads_what_its_base_reads():
    plan = make_plan(CHAT, "tiny", hardware=MACHINES["laptop"])
    assert plan.download_bytes == 0 and plan.max_length == 512
    assert plan.shape == model_shape("mini-zephyr") and plan.dtype.itemsize == 4


def test_an_encoder_cannot_chat_and_a_decoder_is_not_fine_tuned_as_bert():
    with pytest.raises(ProfileError, match="cannot write"):
        make_plan(CHAT, "tiny", model="mini-bert", hardware=MACHINES["laptop"])
    with pytest.raises(ProfileError, match="not a BERT-like encoder"):
        make_plan(LESSON, "tiny", model="mini-zephyr", hardware=MACHINES["laptop"])


SFT = "week06/04_sft_dry_run"
ALL = ["full", "lora", "qlora"]


@pytest.fixture
def with_methods(monkeypatch):
    """Give the lesson's profiles the settings of one that compares methods."""
    from course_lib.profiles import lesson_settings as settled

    more = {"methods": ALL, "lr_lora": 4e-3, "rank": 8}
    monkeypatch.setattr(profiles, "lesson_settings", lambda *given, **named: settled(*given, **named) | more)


def test_a_lesson_that_names_no_methods_trains_all_weights():
    plan = make_plan(SFT, "tiny", hardware=MACHINES["laptop"])
    assert plan.methods == ["full"] and list(plan.method_memory) == ["full"]
    assert plan.method_memory["full"] == plan.needed and "all of them trained" in repr(plan)


def test_a_plan_holds_what_each_method_needs_and_is_cut_for_the_hungriest(with_methods):
    plan = make_plan(SFT, "tiny", hardware=MACHINES["laptop"])
    assert plan.methods == ALL and plan.given_up == []
    needed = {name: held.total for name, held in plan.method_memory.items()}
    assert plan.needed.total == max(needed.values()) == needed["full"] and needed["qlora"] < needed["full"]
    shown = dict(plan.rows())
    assert shown["memory"].startswith(f"full {needed['full'] / GIB:.1f}, LoRA ")
    assert "full, LoRA, QLoRA" in shown["model"]


def test_a_method_that_does_not_fit_is_planned_only(with_methods):
    plan = make_plan(SFT, "full", hardware=MACHINES["A100"])
    assert (plan.model, plan.methods) == ("Qwen/Qwen2.5-7B", ["lora", "qlora"])
    assert plan.given_up[0].startswith("full tuning of Qwen/Qwen2.5-7B, which needs 1") and "planned only" in repr(plan)
    assert plan.needed == plan.method_memory["lora"] and plan.needed.total <= plan.hardware.free_bytes
    tight = make_plan(SFT, "full", hardware=replace(MACHINES["A100"], free_bytes=13 * GIB))
    assert tight.methods == ["qlora"] and len(tight.method_memory) == 1
    assert [text.split(" of ")[0] for text in tight.given_up[:2]] == ["full tuning", "LoRA"]
    assert tight.batch_size * tight.accumulation == 16 and tight.needed.total <= 13 * GIB


def test_only_where_no_method_fits_the_smaller_model_is_taken(with_methods):
    plan = make_plan(SFT, "full", hardware=replace(MACHINES["A100"], free_bytes=5 * GIB))
    assert plan.model == "HuggingFaceTB/SmolLM2-135M" and plan.methods == ALL
    assert plan.given_up[0].startswith("Qwen/Qwen2.5-7B, which needs") and "instead" in plan.given_up[0]
    assert not any("planned only" in text for text in plan.given_up)
    nothing = make_plan(SFT, "full", hardware=replace(MACHINES["A100"], free_bytes=GIB // 2))
    assert "nothing fits" in nothing.given_up[-1] and nothing.batch_size == 1 and len(nothing.methods) == 1


@pytest.mark.parametrize("machine", ["mac", "H100"])  # H100 has no bitsandbytes here
def test_without_bitsandbytes_there_is_no_qlora(with_methods, machine):
    plan = make_plan(SFT, "tiny", hardware=MACHINES[machine])
    assert plan.methods == ["full", "lora"] and "QLoRA: bitsandbytes is not there" in plan.given_up[0]


def test_a_model_of_ones_own_has_ten_times_its_rate_for_lora(with_methods):
    own = make_plan(SFT, "tiny", hardware=MACHINES["laptop"], model="HuggingFaceTB/SmolLM2-135M")
    assert (own.lr, own.lr_lora) == (1e-4, 1e-3)
    assert make_plan(SFT, "tiny", hardware=MACHINES["laptop"]).lr_lora == 4e-3
    told = make_plan(SFT, "tiny", hardware=MACHINES["laptop"], model="HuggingFaceTB/SmolLM2-135M", lr_lora=5e-4)
    assert (told.lr, told.lr_lora) == (1e-4, 5e-4)


LORA, QLORA = "week06/05_lora", "week06/06_qlora"


def test_a_lesson_that_compares_two_methods_takes_the_smaller_model_where_one_of_them_does_not_fit():
    plan = make_plan(LORA, "full", hardware=MACHINES["T4"])
    assert plan.model == "HuggingFaceTB/SmolLM2-135M" and plan.methods == ["full", "lora"]
    assert "SmolLM2-1.7B" in plan.given_up[0]
    own = make_plan(LORA, "colab", model="Qwen/Qwen2.5-7B", hardware=MACHINES["A100"])
    assert own.model == "HuggingFaceTB/SmolLM2-135M" and own.methods == ["full", "lora"]
    cramped = make_plan(LORA, hardware=MACHINES["small"])
    assert cramped.methods == ["full", "lora"] and "nothing fits" in cramped.given_up[-1]


def test_the_lesson_on_four_bits_has_them_on_every_machine():
    for name in ("laptop", "T4", "A100", "small"):
        assert "qlora" in make_plan(QLORA, hardware=MACHINES[name]).methods
    assert make_plan(QLORA, hardware=MACHINES["A100"]).methods == ["lora", "qlora"]
    with pytest.raises(ProfileError, match="pip install bitsandbytes"):
        make_plan(QLORA, hardware=replace(MACHINES["T4"], bitsandbytes=False))
    mac = make_plan(QLORA, hardware=replace(MACHINES["mac"], bitsandbytes=True))
    assert (mac.profile, mac.model, mac.hardware.kind) == ("tiny", "mini-zephyr", "cpu")
    assert "Apple" in mac.profile_why and mac.methods == ["full", "lora", "qlora"]
