"""The model card: what the model was trained on, how, and how well it does."""

import math
from typing import Any

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
prompt = tokenizer("Does money buy happiness?" + tokenizer.eos_token, return_tensors="pt").input_ids
reply = model.generate(prompt, max_new_tokens=40, do_sample=True, top_p=0.9, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(reply[0, prompt.shape[1] :], skip_special_tokens=True))
```"""


def model_card(run: dict[str, Any], step: int) -> str:
    """Return README.md of an export.

    Args:
        run: what a checkpoint keeps of its run: model, data, settings, figures.
        step: optimizer step of the weights.
    """
    data = [
        f"| {d['name']} | {d['weight']} | {d['examples']:,} | {d['tokens']:,} | {d['target_tokens']:,} | "
        f"`{d['fingerprint'][:16]}` |"
        for d in run["data"]
    ]
    figures = [
        ("optimizer steps", f"{step:,}"),
        ("tokens seen", f"{run['tokens_seen']:,}"),
        ("targets seen", f"{run['targets_seen']:,}"),
    ]
    if run["eval_loss"] is not None:
        figures += [
            (f"evaluation loss (nats a target, step {run['eval_step']:,})", f"{run['eval_loss']:.4f}"),
            (f"evaluation perplexity (step {run['eval_step']:,})", f"{math.exp(min(run['eval_loss'], 700)):,.2f}"),
            ("evaluation data", f"{run['eval_data']['name']}, {run['eval_data']['target_tokens']:,} targets"),
        ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [conversational, dialogue]",
            "---",
            "",
            f"# {run['model']}, a dialogue response model",
            "",
            "Trained with dialogpt-ds. Every turn of a conversation ends with the end-of-text token; the model goes "
            "on with the next turn.",
            f"It was trained on rows of at most {run['row_length']:,} tokens: longer conversations lie outside of what "
            "it has seen.",
            "",
            USE,
            "",
            "## Data",
            "",
            "| shards | weight | examples | tokens | targets | fingerprint |",
            "|---|---|---|---|---|---|",
            *data,
            "",
            "## Figures",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in figures),
            "",
            "## Settings",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in run["settings"].items()),
            "",
        ]
    )
