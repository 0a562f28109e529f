"""One dial: tiny, colab or full; a lesson's settings; and the plan that is shown before anything is downloaded.

The settings stand in profiles.toml beside this file.
"""

from __future__ import annotations

import html
import os
import shutil
import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from course_lib.errors import ProfileError
from course_lib.hardware import GIB, Hardware, detect, pick_dtype
from course_lib.memory import GenerationMemory, TrainingMemory, generation_memory, training_memory
from course_lib.shapes import DATA as DATA
from course_lib.shapes import DecoderShape, EncoderShape, Shape, VisionLanguageShape, model_folder, model_shape
from course_lib.shapes import adapter_base as adapter_base

PROFILES = ("tiny", "colab", "full")
WORDS = {"optimizer": "Adam", "kv_cache": "keys and values", "runtime": "libraries"}
METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
METHOD_WORDS = {"full": "full tuning", "lora": "LoRA", "qlora": "QLoRA"}


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))


def choose_profile(hardware: Hardware) -> tuple[str, str]:
    """Return ``(profile, reason)`` for PROFILE = "auto". (Week 6, lesson 1.)"""
    gib = hardware.memory_bytes / GIB
    if hardware.kind == "cuda" and gib >= 36:
        return "full", f"{hardware.name} has {gib:.0f} GiB"
    if hardware.kind == "cuda":
        return "colab", f"{hardware.name} has {gib:.0f} GiB"
    if hardware.kind == "mps" and gib >= 16:
        return "colab", f"an Apple GPU with {gib:.0f} GiB shared"
    return "tiny", "no CUDA device was found"


@dataclass(frozen=True)
class Plan:
    """What a lesson is about to do on this machine, and what it gave up to fit.

    ``settings`` are the lesson's own values from profiles.toml; each can be read as an attribute of the plan.
    To change one, use keyword arguments of `make_plan` before, or `changed` after, and say why.
    """

    lesson: str
    profile: str
    profile_why: str
    task: str
    model: str
    hardware: Hardware
    dtype: Any
    dtype_why: str
    settings: dict[str, Any]
    shape: Shape
    needed: TrainingMemory | GenerationMemory
    accumulation: int = 1
    given_up: list[str] = field(default_factory=list)

    def __getattr__(self, name: str):
        try:
            return self.__dict__["settings"][name]
        except KeyError:
            raise AttributeError(f"the plan for {self.__dict__.get('lesson')} has no setting {name!r}") from None

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the lesson's main training run."""
        return -(-self.train_rows // (self.batch_size * self.accumulation)) * self.epochs

    @property
    def minutes(self) -> float:
        """Return the estimated minutes of the main training run: 6 operations a weight and token."""
        body = self.shape.num_parameters() - self.shape.vocab_size * self.shape.hidden_size
        tokens = self.train_rows * self.epochs * min(self.mean_tokens, self.max_length)
        return 6 * body * tokens / (_teraflops(self.hardware) * 1e12) / 60

    def changed(self, **settings) -> Plan:
        """Return the same plan with some settings replaced, as in ``plan.changed(train_rows=len(rows))``.

        Raises ProfileError for a setting that the lesson does not have.
        """
        if unknown := set(settings) - set(self.settings):
            raise ProfileError(f"{self.lesson} has no setting {', '.join(sorted(unknown))}")
        return replace(self, settings=self.settings | settings)

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as (what, value) pairs."""
        hardware = self.hardware
        return [
            ("profile", f"{self.profile}: {self.profile_why}"),
            ("device", f"{hardware.name}, {hardware.memory_bytes / GIB:.0f} GiB"),
            ("dtype", f"{str(self.dtype).removeprefix('torch.')}: {self.dtype_why}"),
            *self._work(),
            ("memory", self._memory()),
            ("given up", "; ".join(self.given_up) or "nothing"),
        ]

    def _memory(self) -> str:
        held = {name: size for name, size in vars(self.needed).items() if size or name != "adapters"}
        parts = ", ".join(f"{WORDS.get(name, name)} {size / GIB:.2f}" for name, size in held.items())
        return f"{self.needed.total / GIB:.1f} GiB needed of {self.hardware.free_bytes / GIB:.1f} GiB free ({parts})"

    def _work(self) -> list[tuple[str, str]]:
        return [
            ("model", f"{self.model}, {self.shape.num_parameters(self.num_labels) / 1e6:.1f} M parameters"),
            ("task", f"{self.task}: up to {self.train_rows:,} rows to train on, {self.test_rows:,} to test on"),
            *self._training(),
        ]

    def _training(self) -> list[tuple[str, str]]:
        batch = f"{self.batch_size}" + (f" x {self.accumulation} accumulated" if self.accumulation > 1 else "")
        return [
            ("training", f"{self.epochs} epochs of batches of {batch}, about {self.steps:,} steps, {self._rate()}"),
            ("time", f"about {max(self.minutes, 0.05):.1f} minutes of training (estimate)"),
        ]

    def _rate(self) -> str:
        return f"lr {self.lr:g}"

    def __repr__(self) -> str:
        return "\n".join(f"{name:9} {value}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left;vertical-align:top'>{name}</th><td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table>{cells}</table>"


def make_plan(
    lesson: str,
    profile: str = "auto",
    *,
    task: str = "",
    model: str = "",
    data_dir: str = "",
    hardware: Hardware | None = None,
    **changes,
) -> Plan:
    """Return the plan of a lesson on this machine, before weights or data are downloaded. (Week 6, lesson 1.)

    ``task`` and ``model`` default to the lesson's own, ``data_dir`` is a folder of one's own; ``model`` may be a bundled
    miniature, a folder or a Hub id. Other keywords replace settings, as in ``train_rows=512``. What does not fit
    the device's free memory is cut: first the batch (gradients are accumulated), then the model. A model other than the
    profile's brings a learning rate of its own and caps ``max_length`` at what it can read.

    Raises ProfileError for an unknown lesson, profile, task or setting.
    """
    hardware = hardware or detect()
    why = "asked for"
    if profile == "auto":
        profile, why = choose_profile(hardware)
    settings = lesson_settings(lesson, profile, task, own_data=bool(data_dir))
    if "qlora" in settings.get("needs", ()):
        hardware, reason = _able_to_quantise(lesson, hardware)
        if reason:
            profile, why = "tiny", reason
            settings = lesson_settings(lesson, profile, task)
    if unknown := set(changes) - set(settings):
        raise ProfileError(
            f"{lesson} has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(settings))}"
        )
    settings |= changes
    model = model or settings["model"]
    plan = _plan_chat if settings.get("kind") in ("chat", "vision") else _plan_training
    return plan(lesson, profile, why, model, hardware, settings, changes)


def _plan_training(lesson, profile, why, model, hardware, settings, changes) -> Plan:
    dtype, dtype_why = pick_dtype(hardware)
    shape = _settle(model, settings, changes)
    methods, given_up = _methods_that_fit(model, shape, settings, hardware, dtype)
    if not methods and model != settings["smaller_model"]:
        smaller = settings["smaller_model"]
        asked = {name: _needed(shape, 1, settings, hardware, dtype, name).total for name in _asked(settings, hardware)}
        least = max((asked[name] for name in settings.get("needs", ())), default=min(asked.values()))
        given_up = [f"{model}, which needs {least / GIB:.1f} GiB even at batch size 1: {smaller} instead"]
        model, shape = smaller, _settle(smaller, settings, changes)
        methods, more = _methods_that_fit(model, shape, settings, hardware, dtype)
        given_up += more
    fits = bool(methods)
    if not fits:
        least = min(
            _asked(settings, hardware), key=lambda name: _needed(shape, 1, settings, hardware, dtype, name).total
        )
        methods = list(settings.get("needs", [least]))
        given_up = given_up[:1] if model == settings["smaller_model"] != settings["model"] else []
    batch_size, memory = _largest_batch(shape, settings, hardware, dtype, methods)
    needed = max(memory.values(), key=lambda each: each.total)
    accumulation = settings["batch_size"] // batch_size
    if not fits:
        given_up.append(_nothing_fits(needed))
    elif accumulation > 1:
        given_up.append(
            f"batch size {settings['batch_size']}: {batch_size} fits, {accumulation} are accumulated for each step"
        )
    settings["batch_size"] = batch_size
    task, plan = settings.get("task", "sft"), Plan
    extra = {}
    if settings.get("kind") == "sft":
        plan, extra = SFTPlan, {"method_memory": memory}
        settings["methods"] = methods
    return plan(
        lesson,
        profile,
        why,
        task,
        model,
        hardware,
        dtype,
        dtype_why,
        settings,
        shape,
        needed,
        accumulation,
        given_up,
        **extra,
    )


def _able_to_quantise(lesson: str, hardware: Hardware) -> tuple[Hardware, str]:
    """Return a machine that bitsandbytes runs on, an Apple GPU's CPU in its place, and why. Raises ProfileError."""
    if not hardware.bitsandbytes:
        raise ProfileError(
            f"{lesson} trains on four bits, which needs bitsandbytes: pip install bitsandbytes, then restart the kernel"
        )
    if hardware.kind != "mps":
        return hardware, ""
    cpu = replace(hardware, kind="cpu", name=f"CPU, {hardware.cpu_cores} cores", bf16=False)
    return cpu, "bitsandbytes does not run on an Apple GPU, only on its CPU"


def _asked(settings, hardware) -> list[str]:
    """Return the methods that a lesson asks for and this device has; full tuning where a lesson names none."""
    can_nf4 = hardware.bitsandbytes and hardware.kind != "mps"
    methods = [method for method in settings.get("methods", ["full"]) if method != "qlora" or can_nf4]
    return methods or ["full"]


def _methods_that_fit(model, shape, settings, hardware, dtype) -> tuple[list[str], list[str]]:
    """Return the methods that fit at batch size 1, and what to say of those that are given up.

    None where one is missing that the lesson cannot do without ("needs").
    """
    asked, methods, given_up = _asked(settings, hardware), [], []
    if "qlora" in settings.get("methods", []) and "qlora" not in asked:
        given_up.append("QLoRA: bitsandbytes is not there for this device")
    for method in asked:
        needed = _needed(shape, 1, settings, hardware, dtype, method)
        if needed.total <= hardware.free_bytes:
            methods.append(method)
        else:
            given_up.append(
                f"{METHOD_WORDS[method]} of {model}, which needs {needed.total / GIB:.1f} GiB: planned only"
            )
    if not set(settings.get("needs", ())) <= set(methods):
        return [], given_up
    return methods, given_up


def _nothing_fits(needed) -> str:
    return f"nothing fits: {needed.total / GIB:.1f} GiB are needed; close other notebooks and run this cell again"


@dataclass(frozen=True, repr=False)
class SFTPlan(Plan):
    """A plan for teaching a decoder by conversations: all its weights, float32, or adapters on them.

    ``methods`` are those of the lesson's that fit here, ``method_memory`` what each needs; ``needed`` is the hungriest's.
    """

    method_memory: dict[str, TrainingMemory] = field(default_factory=dict)

    def _memory(self) -> str:
        if len(self.method_memory) < 2:
            return super()._memory()
        needed = ", ".join(f"{METHODS[name]} {held.total / GIB:.1f}" for name, held in self.method_memory.items())
        return f"{needed} GiB needed of {self.hardware.free_bytes / GIB:.1f} GiB free"

    def _rate(self) -> str:
        rates = {"full": f"lr {self.lr:g}", "lora": f"lr {self.settings.get('lr_lora', self.lr):g} for adapters"}
        return ", ".join(dict.fromkeys(rates.get(name, rates["lora"]) for name in self.methods))

    def _work(self) -> list[tuple[str, str]]:
        how = "all of them trained" if self.methods == ["full"] else ", ".join(METHODS[name] for name in self.methods)
        return [
            ("model", f"{self.model}, {self.shape.num_parameters() / 1e6:,.1f} M parameters, {how}"),
            ("data", f"up to {self.train_rows:,} conversations of {self.max_length} tokens at most, from {self.data}"),
            *self._training(),
        ]


@dataclass(frozen=True, repr=False)
class ChatPlan(Plan):
    """A plan for loading a model and talking to it: no training."""

    @property
    def download_bytes(self) -> int:
        """Return what the Hub sends the first time: the published weights, 16 bits each."""
        names = {name for name in self._models() if model_folder(name) is None}
        return sum(model_shape(name).weight_bytes(2) for name in names)

    def _models(self) -> list[str]:
        return [self.model, self.base_model]

    def _more(self) -> tuple[str, str]:
        return "beside it", f"{self.base_model}, which was never taught to chat"

    def _work(self) -> list[tuple[str, str]]:
        size, free = self.download_bytes, _cache_free_bytes()
        how = (
            "in NF4, 4.13 bits a weight in its layers"
            if self.precision == "nf4"
            else f"{self.dtype.itemsize * 8} bits a weight"
        )
        fetched = f"{size / 1e9:.1f} GB from the Hub, the first time only; {free / 1e9:.0f} GB free on the disk"
        return [
            ("model", f"{self.model}, {self.shape.num_parameters() / 1e6:,.1f} M parameters, {how}"),
            self._more(),
            ("download", fetched if size else f"nothing: {'both models are' if self._models()[1:] else 'it is'} here"),
            ("context", f"{self.max_length:,} tokens at once, replies of up to {self.max_new_tokens}"),
        ]


@dataclass(frozen=True, repr=False)
class VisionPlan(ChatPlan):
    """A plan for talking to a model about pictures: its weights plain, nothing beside it. (Week 6, lesson 3.)"""

    def _models(self) -> list[str]:
        return [self.model]

    def _more(self) -> tuple[str, str]:
        shape, vision = self.shape, self.shape.vision
        pixels, side = f"{vision.image_size} x {vision.image_size} pixels", vision.patches_per_side
        if shape.cuts_tiles:
            return "pictures", f"{shape.image_tokens} tokens a tile of {pixels}; a large picture is cut into several"
        return "pictures", f"{shape.image_tokens} tokens for a picture of {pixels} ({side} x {side} patches)"


def _plan_chat(lesson, profile, why, model, hardware, settings, changes) -> ChatPlan:
    """Return the plan for talking to a model: 16-bit weights where they fit, else NF4, else the miniature.

    One that sees has no NF4, and float32 on a GPU without bfloat16, where that fits.
    """
    import torch

    dtype, dtype_why = pick_dtype(hardware)
    dtype_why = dtype_why.split(";")[0]  # the rest is about training
    if hardware.kind == "cpu":
        dtype, dtype_why = torch.float32, "exact, and fast enough where nothing is trained"
    sees = settings["kind"] == "vision"
    exact = _talking(model, "plain", settings, hardware, torch.float32)[0].total
    if sees and dtype == torch.float16 and exact <= hardware.free_bytes:
        dtype, dtype_why = torch.float32, f"{dtype_why}; float16 can overflow in a vision tower, and float32 fits"
    given_up: list[str] = []
    can_nf4 = hardware.bitsandbytes and hardware.kind != "mps" and not sees
    smaller = settings["smaller_model"]
    precision = settings["precision"] if model_folder(model) is None else "plain"
    if precision == "nf4" and not can_nf4:
        given_up.append(f"NF4: {'not in this lesson' if sees else 'bitsandbytes is not there for this device'}")
        precision = "plain"
    needed, shape = _talking(model, precision, settings, hardware, dtype)
    if needed.total > hardware.free_bytes and precision == "plain" and can_nf4 and model != smaller:
        given_up.append(f"{dtype.itemsize * 8} bits a weight, which need {needed.total / GIB:.1f} GiB: NF4 instead")
        precision = "nf4"
        needed, shape = _talking(model, precision, settings, hardware, dtype)
    room = model_folder(model) is not None or shape.weight_bytes(2) < _cache_free_bytes()
    if model != smaller and (needed.total > hardware.free_bytes or not room):
        lacks = f"{needed.total / GIB:.1f} GiB of memory" if room else f"{shape.weight_bytes(2) / 1e9:.1f} GB of disk"
        given_up.append(f"{model}, which needs {lacks}: {smaller} instead")
        model, precision = smaller, "plain"
        settings |= {} if sees else {"base_model": settings["smaller_base"], "questions": "isles"}
        needed, shape = _talking(model, precision, settings, hardware, dtype)
    if needed.total > hardware.free_bytes:
        given_up.append(_nothing_fits(needed))
    settings["precision"] = precision
    settings["max_length"] = min(settings["max_length"], _decoder(shape).max_position_embeddings)
    if sees and model == smaller and "pictures" not in changes:
        settings["pictures"] = "shapes"  # it has seen nothing else
    plan = VisionPlan if sees else ChatPlan
    return plan(
        lesson, profile, why, settings["kind"], model, hardware, dtype, dtype_why, settings, shape, needed, 1, given_up
    )


def _talking(model, precision, settings, hardware, dtype) -> tuple[GenerationMemory, Shape]:
    """Return what a model that talks and the base beside it need, and the model's shape. Raises ProfileError."""
    shape, base = model_shape(model), settings.get("base_model")
    if settings["kind"] == "vision" and not isinstance(shape, VisionLanguageShape):
        raise ProfileError(
            f"{model} cannot see; set MODEL to a model of pictures and text, such as "
            "HuggingFaceTB/SmolVLM-256M-Instruct, or to '' for the profile's own"
        )
    if settings["kind"] == "chat" and not (
        isinstance(shape, DecoderShape) and isinstance(model_shape(base), DecoderShape)
    ):
        what = "of pictures and text" if isinstance(shape, VisionLanguageShape) else "an encoder, which cannot write"
        raise ProfileError(f"{model} is {what}; set MODEL to a chat model, or to '' for the profile's own")
    text, size = _decoder(shape), dtype.itemsize
    length = min(settings["max_length"], text.max_position_embeddings)
    needed = generation_memory(text, length, value_bytes=size, on_cpu=hardware.kind == "cpu")
    weights = shape.weight_bytes(size, nf4=precision == "nf4") + (model_shape(base).weight_bytes(size) if base else 0)
    return replace(needed, weights=weights), shape


def _decoder(shape: Shape) -> DecoderShape:
    """Return the part of a model that writes."""
    return shape.text if isinstance(shape, VisionLanguageShape) else shape


def _cache_free_bytes() -> int:
    """Return the free bytes of the disk that the Hub's downloads go to."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _settle(model: str, settings: dict[str, Any], changes: dict[str, Any]) -> EncoderShape | DecoderShape:
    """Return a model's shape, and fit to it the settings that go with a model: its rate, the length it can read."""
    shape = model_shape(model)
    wanted, told = EncoderShape, "a BERT-like encoder"
    if settings.get("kind") == "sft":
        wanted, told = DecoderShape, "a decoder of Llama's kind"
    if not isinstance(shape, wanted):
        raise ProfileError(f"{model} is not {told}, which this lesson fine-tunes; set MODEL to one, or to ''")
    if model != settings["model"] and "lr" not in changes:
        by_size = next(lr for limit, lr in _table()["lr"]["by_hidden_size"] if shape.hidden_size <= limit)
        settings["lr"] = _table()["lr"]["models"].get(model, by_size)
        if "lr_lora" in settings and "lr_lora" not in changes:
            settings["lr_lora"] = 10 * settings["lr"]  # as the lessons' own profiles have it
    settings["max_length"] = min(settings["max_length"], shape.max_position_embeddings)
    return shape


def _largest_batch(shape, settings, hardware, dtype, methods) -> tuple[int, dict[str, TrainingMemory]]:
    """Return the largest of the batch sizes B, B/2, B/4 ... 1 that fits for all methods, and what each needs."""
    batch_size = settings["batch_size"]
    while True:
        memory = {method: _needed(shape, batch_size, settings, hardware, dtype, method) for method in methods}
        if batch_size == 1 or max(needed.total for needed in memory.values()) <= hardware.free_bytes:
            return batch_size, memory
        batch_size //= 2


def _needed(shape, batch_size, settings, hardware, dtype, method="full") -> TrainingMemory:
    on_cpu = hardware.kind == "cpu"
    tokens = batch_size * settings["max_length"]
    return training_memory(
        shape,
        batch_size,
        settings["max_length"],
        method=method,
        rank=settings.get("rank", 16),
        optimizer=settings.get("optimizer", "adamw"),
        checkpointing=settings.get("checkpointing", False),
        num_labels=settings.get("num_labels", 0),
        value_bytes=dtype.itemsize,
        on_cpu=on_cpu,
        keeps_scores=on_cpu and dtype.itemsize == 2,  # eager attention there
        learnt_tokens=tokens // 2 if on_cpu else 0,  # on a GPU, TRL's head makes its logits piece by piece
    )


def lesson_settings(lesson: str, profile: str, task: str = "", *, own_data: bool = False) -> dict[str, Any]:
    """Return a lesson's settings for a profile and task, as profiles.toml has them. Raises ProfileError.

    With ``own_data`` the profile's table "folder" comes last: rows from a folder that the student names.
    """
    lessons = {name: table for name, table in _table().items() if name.startswith("week")}
    if lesson not in lessons:
        raise ProfileError(f"unknown lesson {lesson!r}; choose one of {', '.join(lessons)}")
    if profile not in PROFILES:
        raise ProfileError(f"unknown profile {profile!r}; choose one of auto, {', '.join(PROFILES)}")
    shared, own = lessons[lesson], lessons[lesson][profile]
    plain = {name: value for name, value in own.items() if not isinstance(value, dict)}
    common = {name: value for name, value in shared.items() if name not in (*PROFILES, "tasks", "num_labels")}
    if "tasks" not in shared:
        return plain | common
    task = task or shared["tasks"][0]
    if task not in shared["tasks"]:
        raise ProfileError(f"unknown task {task!r}; {lesson} has {', '.join(shared['tasks'])}")
    chosen = common | {"task": task, "num_labels": shared["num_labels"][task]}
    return plain | own.get(task, {}) | (own.get("folder", {}) if own_data else {}) | chosen


def run_folder(lesson: str) -> Path:
    """Return the folder for what a lesson writes, making it if need be: runs/ here, or under COURSE_RUNS."""
    folder = Path(os.environ.get("COURSE_RUNS", "runs")) / lesson
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _teraflops(hardware: Hardware) -> float:
    speeds = _table()["teraflops"]
    if hardware.kind == "cpu":
        return speeds["cpu"] * hardware.cpu_cores
    return next((speed for name, speed in speeds.items() if name in hardware.name), speeds[hardware.kind])
