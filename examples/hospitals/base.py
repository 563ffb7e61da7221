"""A small Llama, warmed up on public text: the base model of the hospitals example, so that it needs no network.

    python examples/hospitals/base.py PUBLIC.txt FOLDER

trains a byte-level BPE tokenizer and a model of about a million weights in about a minute. FOLDER then holds what
`save_pretrained` writes, and `made_from.txt`: a digest of this file and the text. As long as that matches, another call does nothing.
"""

import argparse
import hashlib
import math
import shutil
import tempfile
import time
from pathlib import Path

VOCABULARY = 1024
CONTEXT = 256
WINDOW = 128  # tokens per row in training
ROWS = 8  # rows per step
STEPS = 230
WARMUP = 30
RATE = 4e-3
SEED = 7


def make_tokenizer(passages: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Digits one by one: a number that was never seen is read, and repeated, like any other.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(passages, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def warm_up(model, tokenizer, passages: list[str]) -> float:
    """Train on the passages laid end to end; returns the mean loss of the last steps, nats per token."""
    import torch

    encoded = tokenizer(passages, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for passage in encoded for token in (tokenizer.bos_token_id, *passage, tokenizer.eos_token_id)])
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    losses = []
    model.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 0.51 + 0.49 * math.cos(math.pi * step / STEPS))
        starts = torch.randint(len(ids) - WINDOW, (ROWS,), generator=generator)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts.tolist()])  # (ROWS, WINDOW)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-20:]) / 20


def make(public: Path, folder: Path) -> bool:
    """Put the base at ``folder``, in one rename, unless it is there; returns whether there was anything to do."""
    made_from = hashlib.sha256(Path(__file__).read_bytes() + public.read_bytes()).hexdigest()
    stamp = folder / "made_from.txt"
    if stamp.is_file() and stamp.read_text() == made_from:
        return False
    import torch
    from transformers.utils import logging

    print(f"a small base model is made, once, in about a minute: {folder}", flush=True)
    logging.disable_progress_bar()
    began = time.monotonic()
    torch.set_num_threads(1)  # the same sums on every machine, and on a busy one much faster than two
    torch.manual_seed(SEED)
    passages = public.read_text(encoding="utf-8").splitlines()
    tokenizer = make_tokenizer(passages)
    model = make_model(tokenizer)
    loss = warm_up(model, tokenizer, passages)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".base", dir=folder.parent) as name:
        scratch = Path(name) / "base"
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / stamp.name).write_text(made_from)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    print(f"{folder}: {model.num_parameters():,} weights, loss {loss:.2f} on public text, {time.monotonic() - began:.0f} s")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small base model of the hospitals example, once.")
    parser.add_argument("public", type=Path, help="public.txt of notes.py")
    parser.add_argument("folder", type=Path, help="where the model goes")
    args = parser.parse_args()
    if not make(args.public, args.folder):
        print(f"{args.folder}: there already")


if __name__ == "__main__":
    main()
