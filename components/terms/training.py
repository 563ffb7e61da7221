"""Training, as terms: which model is fine-tuned, on what of the records, and how a silo trains it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from silotune.components.terms.privacy import MAX_GRAD_NORM
from silotune.components.terms.section import Fraction, Positive, Section

FIELDS = {"prompt-response": ("prompt", "response"), "chat": ("messages",), "text": ("text",)}  # of a record, by format


class Lora(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): the update of a weight is (alpha / r) · B·A."""

    r: Positive = Field(8, description="Rank of the adapters.")
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False, description="Scaling: an adapter counts alpha / r times.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter, in training only.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the layers that get adapters, or `all-linear` for every linear layer but the output."
    )


class Model(Section):
    """What is fine-tuned."""

    base: str = Field(description="A local folder, `s3://bucket/prefix`, or a Hugging Face id (`org/name`, `org/name@revision`).")
    method: Literal["lora", "full"] = Field("lora", description="Train adapters, or every weight.")
    lora: Lora = Field(default_factory=Lora, description="Shape of the adapters; unused with `method: full`.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type the frozen base weights are held in (trained weights: float32)."
    )


class Data(Section):
    """How records become examples; the same in every silo."""

    format: Literal["prompt-response", "chat", "text"] = Field(
        "prompt-response", description="`prompt-response` and `chat` learn from responses only, `text` from every token."
    )
    template: str = Field(
        "Question: {prompt}\nAnswer: {response}",
        description="Layout of a prompt-response example; ends with `{response}`. `chat` uses the tokenizer's chat template instead.",
    )
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="Columns that are named otherwise in the files: `{prompt: question, response: answer}`; see also `silos[].fields`.",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens per example at most.")
    long_examples: Literal["truncate", "drop"] = Field(
        "truncate", description="What happens to a longer example; `text` is cut into several examples instead of being truncated."
    )
    valid_fraction: Fraction = Field(
        0.05,
        description="Share of train set aside, where a silo names no `valid`: each record, or person, by its content and the seed, so that more records move none.",
    )

    @model_validator(mode="after")
    def _template_has_places(self) -> Data:
        if self.template != "chat" and (self.template.count("{prompt}") != 1 or not self.template.endswith("{response}")):
            raise ValueError("template must hold {prompt} once and end with {response}, or be 'chat'")
        if problem := renames(self.fields, self.format):
            raise ValueError(problem)
        return self


def renames(fields: Iterable[str], kind: str) -> str:
    """What is wrong with names for columns of a format; "" where nothing is."""
    known = FIELDS[kind]
    unknown = sorted(set(fields) - set(known))
    return f"fields may rename {', '.join(sorted(known))} for format {kind!r}, not {', '.join(unknown)}" if unknown else ""


class Training(Section):
    """Local training, the same in every silo unless a silo overrides it."""

    steps: Positive = Field(50, description="Optimiser steps per silo and round.")
    batch_size: Positive = Field(8, description="Examples per optimiser step.")
    accumulation: Positive = Field(1, description="Parts a step is split into to save memory; the gradient is the same.")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="Peak rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Course of the rate within a round, after warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps at the start of every round in which the rate climbs.")
    round_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the peak rate over `rounds.total` rounds; the plan of a round records its rate."
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(MAX_GRAD_NORM, gt=0, allow_inf_nan=False, description="L2 norm that a step's gradient is clipped to.")
    packing: bool = Field(
        True, description="Lay short examples of a batch side by side in one row, unable to see each other; saves padding."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations instead of keeping them.")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="`auto`: bfloat16 where a GPU has it, else float32.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(17, description="Seeds data order and initialisation; never noise or masks.")


class SiloTraining(Section):
    """What one silo may train differently from the others."""

    steps: Positive | None = Field(None, description="Instead of `training.steps`.")
    batch_size: Positive | None = Field(None, description="Instead of `training.batch_size`.")
    accumulation: Positive | None = Field(None, description="Instead of `training.accumulation`.")
    gradient_checkpointing: bool | None = Field(None, description="Instead of `training.gradient_checkpointing`.")


class SiloLora(Section):
    """What of the adapters one silo may have differently from the others."""

    r: Positive | None = Field(
        None, description="Rank that this silo trains, at most `model.lora.r`; the scaling alpha / r stays the model's."
    )
