"""weitiao (微调): fine-tune Hugging Face causal language models.

                                                         ┌─ survey ── check            trace ── needs ── plan
    rows.jsonl ── rows ── formats ── templates ── tokens ┴─ cache ── packing ── batch ┐
                                                                                      ├─ loop ── run folder ── chat, evaluate, merge
    smollm2-135m ── source ── load ── methods ── attention ── fused ──────────────────┘

Imports go down only:  cli > use > train > model > data > trie, metrics, screen > config > settings > errors.
"""

__version__ = "0.1.0"
