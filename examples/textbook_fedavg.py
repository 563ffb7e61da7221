"""Textbook FedAvg in a dozen lines: full fine-tuning of a GPT-2 by four silos, round by round, in one process.

    python examples/textbook_fedavg.py [FOLDER]

Writes four silos' texts and a small untrained GPT-2 into FOLDER (default: a temporary one), runs five rounds, prints the loss of each, and
lets the trained model write. For a pretrained one put ``base: gpt2``, a Hugging Face id, into the federation.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import yaml

WHO = {
    "north": ("the nurse", "the patient", "the ward"),
    "south": ("the clerk", "the client", "the desk"),
    "east": ("the cook", "the guest", "the kitchen"),
    "west": ("the guard", "the visitor", "the gate"),
}


def write_silos(folder: Path) -> list[dict[str, str]]:
    """Sentences of one grammar and four vocabularies, a folder of text files for each silo."""
    chance = random.Random(1)
    silos = []
    for silo, (one, other, place) in WHO.items():
        (folder / silo).mkdir()
        for number in range(60):
            mood = chance.choice(["kindly", "slowly", "at once"])
            verb, day = chance.choice(["sees", "greets", "helps"]), chance.choice(["monday", "friday", "sunday"])
            (folder / silo / f"{number:03}.txt").write_text(f"On {day} {one} {verb} {other} {mood} at {place}.")
        silos.append({"id": silo, "train": f"./{silo}"})
    return silos


def write_base(folder: Path) -> None:
    """A GPT-2 of two layers with random weights, and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

    set_seed(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    config = GPT2Config(vocab_size=len(fast), n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)


def main(folder: Path) -> list[float]:
    """Returns the loss after each round, the untrained model's first."""
    federation = {
        "name": "textbook",
        "model": {"base": "./base", "method": "full"},
        "data": {"format": "text", "max_length": 128},
        "silos": write_silos(folder),
        "training": {"steps": 15, "batch_size": 8, "learning_rate": 3e-3},
        "rounds": {"total": 5},
    }
    write_base(folder / "base")
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation))

    from silotune.pipelines.simulate import Simulation

    simulation = Simulation(folder / "federation.yaml")
    for result in simulation.run():
        print(f"round {result.round}: loss {result.loss:.3f}", {silo: round(loss, 2) for silo, loss in result.silos.items()})
    model, tokenizer = simulation.model()
    written = model.generate(**tokenizer("<|endoftext|>On ", return_tensors="pt"), max_new_tokens=60, do_sample=False, pad_token_id=0)
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    return [result.loss for result in simulation.results()]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
