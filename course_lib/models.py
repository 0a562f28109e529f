"""Load a tokenizer and a model for a plan, count and freeze parameters, save without leaving halves behind.

Errors of the Hub, the disk and the accelerator come out as the library's own (see errors), which say what to do.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from pathlib import Path

from course_lib.errors import ModelError, ProfileError, explain_errors
from course_lib.hardware import set_seed
from course_lib.loading import keep_packing, placement, read_causal_lm
from course_lib.profiles import Plan, adapter_base, model_folder

METHODS = ("", "full", "lora", "qlora")


def load_tokenizer(plan: Plan, model: str = ""):
    """Return the tokenizer of the plan's model, or of another one. Raises HubError or ModelError. (Week 6, lesson 1.)"""
    from transformers import AutoTokenizer

    name = model or plan.model
    folder = model_folder(name)
    if folder and (base := adapter_base(folder)) and not (folder / "tokenizer_config.json").is_file():
        name = base
    with explain_errors(name, hub=True):
        tokenizer = AutoTokenizer.from_pretrained(_where(name))
    if tokenizer.pad_token is None:  # many base models have none, and a batch needs one
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(plan: Plan, label_names: list[str], *, seed: int = 0, pretrained: bool = True):
    """Return a BERT with a fresh classification head, in float32 on the plan's device. (Week 6, lesson 1.)

    ``seed`` fixes the head's random weights, and with ``pretrained=False`` all of them: the same architecture, nothing
    learnt. Raises ModelError where the checkpoint is not a BERT, HubError where it cannot be fetched.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with explain_errors(plan.model, hub=True):
        config = AutoConfig.from_pretrained(
            _where(plan.model),
            num_labels=len(label_names),
            id2label=dict(enumerate(label_names)),
            label2id={name: number for number, name in enumerate(label_names)},
        )
        _require_bert(config, plan.model)
        if plan.hardware.kind == "cpu" and plan.dtype == torch.bfloat16:
            config._attn_implementation = "eager"  # 1.1 to 1.5 times as fast as sdpa there (measured)
        set_seed(seed)
        if pretrained:
            model = AutoModelForSequenceClassification.from_pretrained(
                _where(plan.model), config=config, dtype=torch.float32
            )
        else:
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        return model.to(plan.hardware.kind).eval()


def load_masked_lm(plan: Plan):
    """Return the same checkpoint with the head it was pre-trained with, which fills masked words. (Week 6, lesson 1.)

    Raises ModelError where the checkpoint has no such head (sentence encoders are often saved without).
    """
    import torch
    from transformers import AutoModelForMaskedLM

    with explain_errors(plan.model, hub=True):
        model, info = AutoModelForMaskedLM.from_pretrained(
            _where(plan.model), dtype=torch.float32, output_loading_info=True
        )
        _require_bert(model.config, plan.model)
        if missing := [key for key in info["missing_keys"] if key.startswith("cls.predictions.transform")]:
            raise ModelError(
                f"{plan.model} was saved without its masked-word head ({len(missing)} weights missing): it cannot fill masks"
            )
        return model.to(plan.hardware.kind).eval()


def load_causal_lm(plan: Plan, model: str = "", *, method: str = "", pretrained: bool = True, seed: int = 0):
    """Return the plan's model, or another one, to write or to be trained: on the device, in its plan's dtype or NF4. (Week 6, lesson 2.)

    A plan for training (kind "sft") gets float32 weights, for an update is often too small for 16 bits. ``method`` says
    how it is to be trained: "full" for such weights, "lora" for a frozen base in the plan's dtype to put adapters on,
    "qlora" for a frozen base in NF4 with double quantisation. A folder with an adapter is loaded onto its base and
    merged into it. A chat plan's NF4 is for its own model only. With ``pretrained=False`` all weights are random by
    ``seed``: the same architecture, nothing learnt. Weights are read and quantised one tensor at a time, in little more
    memory than the model keeps. Raises ProfileError for an unknown method, HubError where the checkpoint cannot be
    fetched, ModelError where it is not a decoder, does not fit its config, or cannot be had for the method.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, kind = model or plan.model, plan.hardware.kind
    folder = model_folder(name)
    adapter = folder if folder and adapter_base(folder) else None
    where = _where(adapter_base(folder) if adapter else name)
    _check_method(method, plan, adapter)
    trained = bool(method) or plan.settings.get("kind") == "sft"
    frozen = method in ("lora", "qlora")
    options = {"dtype": torch.float32 if trained and not frozen else plan.dtype}
    if trained and kind == "cpu" and plan.dtype == torch.bfloat16:
        options["attn_implementation"] = "eager"  # faster than sdpa there, as for the classifier
    nf4 = method == "qlora" or (not method and plan.settings.get("precision") == "nf4" and name == plan.model)
    with explain_errors(name, hub=True):
        config = AutoConfig.from_pretrained(where)
        if not any("CausalLM" in architecture for architecture in config.architectures or ()):
            raise ModelError(
                f"{name} is a {config.model_type!r} model that cannot write text; set MODEL to a chat model"
            )
        weights = None
        if not pretrained:
            set_seed(seed)
            loaded = AutoModelForCausalLM.from_config(config, **options)
            weights = loaded.state_dict()
        if pretrained or nf4:
            loaded = read_causal_lm(where, config, options | placement(kind, nf4, plan.dtype), weights)
        if adapter and pretrained:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload()
        if trained:
            keep_packing(loaded)
        if frozen or (adapter and trained and not nf4):  # peft froze what it merged
            loaded.requires_grad_(not frozen)
        return loaded.eval() if nf4 else loaded.to(kind).eval()


def load_processor(plan: Plan, model: str = ""):
    """Return what turns pictures and text into the inputs of the plan's model, or of another one, on Pillow alone.

    Its ``tokenizer`` pads on the left, as writing in batches needs it. Raises HubError, or ModelError where the model has
    no processor of pictures or one that needs a package that is not here. (Week 6, lesson 3.)
    """
    from transformers import AutoProcessor

    name = model or plan.model
    folder = model_folder(name)
    if folder and (base := adapter_base(folder)) and not (folder / "processor_config.json").is_file():
        name = base
    try:
        with explain_errors(name, hub=True):
            # torchvision, where it is there, would resize a little otherwise
            processor = AutoProcessor.from_pretrained(_where(name), backend="pil")
    except ImportError as error:
        needs = str(error).strip().splitlines()[0]
        raise ModelError(
            f"the processor of {name} needs a package that is not here: {needs} Or choose another MODEL"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise _cannot_see(name)
    processor.tokenizer.padding_side = "left"
    return processor


def load_image_text(plan: Plan, model: str = "", *, method: str = "", attention: str = ""):
    """Return the plan's model of pictures and text, or another one: on the device, in its plan's dtype. (Week 6, lesson 3.)

    ``method`` "full" gives float32 weights to train, "lora" a frozen base in the plan's dtype to put adapters on.
    ``attention`` "eager" is for reading attention weights, which the default does not keep;
    ``model.set_attn_implementation("eager")`` does the same later. A folder with an adapter is loaded onto its base and
    merged into it. Raises ProfileError for an unknown method, HubError where the checkpoint cannot be fetched, ModelError
    where it cannot see or lacks weights.
    """
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText

    name = model or plan.model
    folder = model_folder(name)
    adapter = folder if folder and adapter_base(folder) else None
    where = _where(adapter_base(folder) if adapter else name)
    if method not in ("", "full", "lora"):
        raise ProfileError(f"no method {method!r} for models that see; choose full, lora, or '' for the plan's own")
    _check_method(method, plan, adapter)
    options = {"attn_implementation": attention} if attention else {}
    with explain_errors(name, hub=True):
        config = AutoConfig.from_pretrained(where)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise _cannot_see(name)
        loaded, told = AutoModelForImageTextToText.from_pretrained(
            where,
            config=config,
            dtype=torch.float32 if method == "full" else plan.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
            **placement(plan.hardware.kind, False, plan.dtype),
        )
        # transformers makes up what is missing or of another shape
        if wrong := sorted(told["missing_keys"]) + [name for name, *_ in told["mismatched_keys"]]:
            raise ModelError(
                f"{where} has no tensor {wrong[0]} of the shape that its config.json tells ({len(wrong)} so): the checkpoint "
                "does not fit; fetch it again"
            )
        if adapter:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, str(adapter)).merge_and_unload()
        return loaded.requires_grad_(method != "lora").eval()


def _cannot_see(model: str) -> ModelError:
    return ModelError(
        f"{model} cannot see; set MODEL to a model of pictures and text, such as HuggingFaceTB/SmolVLM-256M-Instruct, or "
        "to '' for the profile's own"
    )


def _check_method(method: str, plan: Plan, adapter: Path | None) -> None:
    if method not in METHODS:
        raise ProfileError(
            f"unknown method {method!r}; choose one of {', '.join(METHODS[1:])}, or '' for the plan's own"
        )
    if adapter and method in ("lora", "qlora"):
        raise ModelError(
            f"{adapter} is an adapter, which cannot be merged into a base that new adapters are to be trained on: load "
            f"{adapter_base(adapter)!r} with method={method!r} and put it on with peft.PeftModel.from_pretrained(base, folder)"
        )
    if method == "qlora" and (plan.hardware.kind == "mps" or not plan.hardware.bitsandbytes):
        raise ModelError("method 'qlora' needs bitsandbytes, which is not there for this device; set method='lora'")


def _where(model: str) -> str:
    return str(model_folder(model) or model)


def _require_bert(config, model: str) -> None:
    if config.model_type != "bert":
        raise ModelError(
            f"{model} is a {config.model_type!r} model and this lesson fine-tunes BERT; set MODEL to a BERT checkpoint, "
            "such as google-bert/bert-base-uncased, or to '' for the profile's own"
        )


def count_parameters(model) -> tuple[int, int]:
    """Return ``(trainable, all)`` parameters. (Week 6, lesson 1.)"""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def release(*models) -> None:
    """Move models off the accelerator and give its cached memory back."""
    for model in models:
        model.to("cpu")
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def save_model(model, tokenizer, folder: str | Path) -> Path:
    """Save model and tokenizer into ``folder``, whole or not at all, replacing what was there. (Week 6, lesson 1.)

    Raises DiskFullError where there is no room; then the folder is as it was before.
    """
    folder = Path(folder)
    partial = None
    try:
        with explain_errors(str(folder)):
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            partial.chmod(0o755)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            old = partial.with_name(partial.name + "-old")
            if folder.exists():
                folder.replace(old)
            try:
                partial.replace(folder)
            except OSError:
                if old.exists():
                    old.replace(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
