"""The model card: what an exported model is, where it comes from, what is promised of it, how it does, and how to load it."""

from __future__ import annotations

from silotune.components import base_model, best_global
from silotune.components.federation import Agreement, Federation
from silotune.components.protocol import Commit, perplexity, pooled
from silotune.components.rounds import Rounds


def write(federation: Federation, rounds: Rounds, commit: Commit, base: base_model.Base) -> str:
    """As Markdown, with the front matter that model hubs read."""
    agreement = rounds.agreement(commit.agreement)
    made = [c for c in rounds.commits() if c.round <= commit.round]
    silos = sorted({silo for c in made for silo in c.contributions})
    adapters = agreement.model["method"] == "lora" and not federation.export.merge
    location = federation.model.base.partition("@")[0]
    rows = [
        *("---", f"library_name: {'peft' if adapters else 'transformers'}"),
        *([] if location.startswith(("/", "s3://")) else [f"base_model: {location}"]),
        *("tags: [federated-learning, silotune]", "---"),
        *(f"# {federation.name}", ""),
        *(f"A causal language model fine-tuned by {len(silos)} silos that did not share their records, with silotune.", ""),
        *("| lineage | |", "|---|---|"),
        f"| round | {commit.round} |",
        f"| commit | `{commit.digest}` |",
        f"| global | `{commit.outgoing}` |",
        f"| agreement | `{commit.agreement}` |",
        f"| base model | `{agreement.base}` |",
        f"| tokenizer | `{base.tokenizer}` |",
        f"| silos | {', '.join(silos)} |",
        f"| method | {agreement.model['method']}, {agreement.aggregation.strategy} weighted by {agreement.aggregation.weights} |",
        f"| privacy | {promises([rounds.agreement(digest) for digest in dict.fromkeys(c.agreement for c in made if c.contributions)])} |",
        *("", "| model | split | silo | loss (nats per token) | perplexity |", "|---|---|---|--:|--:|", *_scores(rounds, commit), ""),
    ]
    return "\n".join([*rows, *_usage(agreement, adapters=adapters)]).rstrip() + "\n"


def promises(agreements: list[Agreement]) -> str:
    """What is promised of a model whose rounds were made under these terms, which is no more than each of them promises."""
    told = list(dict.fromkeys(_promise(agreement) for agreement in agreements))
    if len(told) > 1:
        return f"the terms have changed between its rounds: {'; then '.join(told)}"
    return told[0] if told else "not trained"


def _promise(agreement: Agreement) -> str:
    terms = agreement.privacy
    whose = "all records of a person" if terms.unit == "person" else "a record"
    parts = [f"epsilon {terms.epsilon:g} at delta {terms.delta:g} for {whose}" if terms.of_records else "none for single records"]
    if terms.silo:
        parts.append(f"epsilon {terms.silo.epsilon:g} at delta {terms.silo.delta:g} for a silo's part")
    parts.append("updates summed unseen" if terms.secure_aggregation else "updates seen by the coordinator")
    return ", ".join(parts)


def _scores(rounds: Rounds, commit: Commit) -> list[str]:
    """Rows of base and federated model, over the silos that scored both on the same records."""
    rows = []
    for split in ("valid", "test"):
        base, federated = (rounds.evaluations(outgoing, split) for outgoing in (rounds.commit(0).outgoing, commit.outgoing))
        both = sorted(best_global.same_records(base, federated))
        for label, scores in (("base", base), ("federated", federated)):
            if found := {silo: scores[silo] for silo in both}:
                rows.append(f"| {label} | {split} | all | {pooled(found)['loss']:.4f} | {pooled(found)['perplexity']:.2f} |")
                losses = ((silo, e.loss) for silo, e in found.items())
                rows += [f"| {label} | {split} | {silo} | {loss:.4f} | {perplexity(loss):.2f} |" for silo, loss in losses]
    return rows


def _usage(agreement: Agreement, *, adapters: bool) -> list[str]:
    """How to load it and ask it something laid out as it was trained."""
    package, name = ("peft", "AutoPeftModelForCausalLM") if adapters else ("transformers", "AutoModelForCausalLM")
    kind, template = agreement.data["format"], agreement.data["template"]
    if kind == "chat" or (kind == "prompt-response" and template == "chat"):
        asked = ['messages = [{"role": "user", "content": "..."}]']
        asked += ['prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")']
    else:
        text = "..." if kind == "text" else template.removesuffix("{response}").replace("{prompt}", "...")
        asked = [f'prompt = tokenizer({text!r}, return_tensors="pt")']
    return [
        *("```python", f"from {package} import {name}", "from transformers import AutoTokenizer", ""),
        f'model = {name}.from_pretrained(".")  # this folder' + ("; the base is named in adapter_config.json" if adapters else ""),
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        *asked,
        *("print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))", "```"),
    ]
