"""Fixtures for all tests: tiny base models, made here and offline, and the shared folder of real data."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import forks  # noqa: F401 - some tests fork
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they bring

# Whoever starts the tests in the background has them ignore Ctrl-C, and all that they start; some of them press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SENTENCES = (
    "Question: what does the heart do?\nAnswer: it moves the blood through the body.",
    "The patient was given ten milligrams and went home the next day.",
    "How do I block a lost card? Call the bank, or open the app and choose cards.",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden anew instead of comparing with it")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models that lies beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared folder at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a byte-level tokenizer of 300 tokens, as save_pretrained writes them."""
    return _save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` whose tokenizer has a chat template."""
    return _save_llama(tmp_path_factory.mktemp("tiny-chat"), CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers: Conv1D weights, learned positions, output tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    size = _save_tokenizer(folder)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    _fixed(GPT2LMHeadModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def tiny_base(request: pytest.FixtureRequest) -> Path:
    """Each tiny model in turn."""
    return request.getfixturevalue(request.param)


def _save_llama(folder: Path, chat_template: str | None = None) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = _save_tokenizer(folder, chat_template)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    _fixed(LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def _save_tokenizer(folder: Path, chat_template: str | None = None) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)


def _fixed(model: Any) -> Any:
    """Deterministic weights in which no two rows are alike or in simple relation, so that a swapped axis or layer shows."""
    import torch

    for i, (name, weight) in enumerate(model.named_parameters()):
        wave = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) ** 1.5 * 0.1 + i).reshape(weight.shape).float()
        with torch.no_grad():
            if weight.ndim > 1:
                weight.copy_(wave * 2 / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(wave * 0.1 + (0.0 if name.endswith("bias") else 1.0))
    return model


@pytest.fixture
def make_federation(tmp_path: Path, tiny_llama: Path) -> Any:
    """Writes a federation file with small made-up data for each silo; see `write_federation`."""

    def make(folder: Path = tmp_path, **changes: Any) -> Path:
        return write_federation(folder, changes.pop("base", tiny_llama), **changes)

    return make


@pytest.fixture(scope="session")
def federation_writer() -> Any:
    """`write_federation`, for what several tests of a module share."""
    return write_federation


def write_federation(folder: Path, base: Path, silos: tuple[str, ...] = ("east", "north", "south"), **sections: Any) -> Path:
    """A federation of a few steps on a few records, different in every silo; ``sections`` replace those of the file."""
    import json

    import yaml

    entries = []
    for s, silo in enumerate(silos):
        entry = {"id": silo}
        for split, count in (("train", 11 + 3 * s), ("valid", 4), ("test", 4)):
            path = folder / "data" / silo / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            records = [
                {"prompt": f"what is case {i} of {silo}?", "response": f"it is {split} {'abcdefgh'[(i * 5 + s) % 8] * 3}"}
                for i in range(count)
            ]
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
            entry[split] = str(path)
        entries.append(entry)
    terms: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": str(base), "lora": {"r": 2, "alpha": 4, "target_modules": "all-linear"}},
        "data": {"max_length": 64},
        "silos": entries,
        "rounds": {"total": 2, "quorum": 2},
        "training": {"steps": 2, "batch_size": 3, "learning_rate": 0.01},
        "tracking": {"uri": "none"},
    }
    file = folder / "federation.yaml"
    file.write_text(yaml.safe_dump(terms | sections))
    return file
