"""What the builder needs to make the checkpoints: a sampler, accuracy, supervised fine-tuning and GRPO.

Small on purpose and for the miniature only: every prompt has the same number of tokens, so batches are
rectangular without left padding. Dimensions: B sequences, P prompt tokens, R response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tcopd_fast.miniature.task import Problem, answer_of, is_correct

MAX_RESPONSE_TOKENS = 24
IGNORED = -100


@dataclass(frozen=True)
class Measurement:
    """Share of correct answers, its standard error over problems, share of responses with work; in 0..1."""

    accuracy: float
    stderr: float
    shows_work: float


def prompt_ids(tokenizer: PreTrainedTokenizerBase, problems: Iterable[str]) -> Tensor:
    """Return the chat-templated prompts, shape (B, P), int64. ValueError if their lengths differ."""
    chats = [[{"role": "user", "content": problem}] for problem in problems]
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the miniature's trainer needs prompts of one token count; these differ")
    return torch.tensor(rows)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts_BP: Tensor,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample one response per prompt; temperature 0 means greedy.

    Returns (B, R) int64 ids, R ≤ 24, ending in the end-of-sequence token and padded after it.
    """
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    finished_B = torch.zeros(len(prompts_BP), dtype=torch.bool)
    tokens: list[Tensor] = []
    inputs, cache = prompts_BP, None
    while len(tokens) < MAX_RESPONSE_TOKENS and not finished_B.all():
        output = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_BV, cache = output.logits[:, -1], output.past_key_values
        if temperature == 0:
            token_B = logits_BV.argmax(-1)
        else:
            probs_BV = torch.softmax(logits_BV / temperature, -1)
            token_B = torch.multinomial(probs_BV, 1, generator=generator).squeeze(1)
        token_B = token_B.masked_fill(finished_B, pad)
        finished_B |= token_B == eos
        tokens.append(token_B)
        inputs = token_B.unsqueeze(1)
    return torch.stack(tokens, 1)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> Measurement:
    """Sample `samples` responses per problem; the standard error is that of the mean over problems."""
    prompts_BP = prompt_ids(tokenizer, (p.problem for p in problems)).repeat_interleave(samples, 0)
    generator = torch.Generator().manual_seed(seed)
    responses_BR = generate(model, prompts_BP, temperature=temperature, generator=generator)
    texts = tokenizer.batch_decode(responses_BR, skip_special_tokens=True)
    answers = [p.answer for p in problems for _ in range(samples)]
    correct = [float(is_correct(text, answer)) for text, answer in zip(texts, answers, strict=True)]
    per_problem = torch.tensor(correct).view(len(problems), samples).mean(1)
    return Measurement(
        accuracy=per_problem.mean().item(),
        stderr=per_problem.std().item() / math.sqrt(len(problems)),
        shows_work=sum(";" in text for text in texts) / len(texts),
    )


def response_logprobs(model: PreTrainedModel, prompts_BP: Tensor, responses_BR: Tensor) -> Tensor:
    """Return log π(y_t) of every response token, shape (B, R), float32."""
    n_response = responses_BR.shape[1]
    logits_BRV = model(torch.cat([prompts_BP, responses_BR], 1), logits_to_keep=n_response + 1).logits[:, :-1]
    return torch.log_softmax(logits_BRV, -1).gather(-1, responses_BR.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Example:
    """One supervised row: the prompt's problem text and the response text."""

    problem: str
    response: str


def supervised_batch(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Return prompts (B, P) and responses (B, R), the latter ended by end-of-sequence and padded."""
    rows = [[*tokenizer.encode(e.response), tokenizer.eos_token_id] for e in examples]
    width = max(map(len, rows))
    responses_BR = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    return prompt_ids(tokenizer, (e.problem for e in examples)), responses_BR


def supervised_fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    next_examples: Callable[[], list[Example]],
    *,
    steps: int,
    lr: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Minimise the token-mean cross-entropy of the responses: AdamW, warm-up, cosine decay to lr/20."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = min(50, max(1, steps // 10))
    for step in range(steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        scale = min(1.0, (step + 1) / warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = lr * scale
        prompts_BP, responses_BR = supervised_batch(tokenizer, next_examples())
        mask_BR = responses_BR != tokenizer.pad_token_id
        loss = -(response_logprobs(model, prompts_BP, responses_BR) * mask_BR).sum() / mask_BR.sum()
        _step(model, optimizer, loss)
        on_step(step, loss.item())


def grpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    next_problems: Callable[[], list[str]],
    *,
    steps: int,
    group: int,
    lr: float,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] = lambda step, mean_reward: None,
) -> None:
    """On-policy GRPO (Shao et al., 2024): reward 1 if correct, one gradient step per batch, no KL term.

    The advantage of a response is its reward minus the mean of its group of `group` responses to one prompt,
    divided by the group's standard deviation; a group whose rewards are all equal gives no gradient.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        problems = [p for p in next_problems() for _ in range(group)]
        prompts_BP = prompt_ids(tokenizer, problems)
        responses_BR = generate(model, prompts_BP, generator=generator)
        texts = tokenizer.batch_decode(responses_BR, skip_special_tokens=True)
        correct = [float(is_correct(text, answer_of(p))) for text, p in zip(texts, problems, strict=True)]
        rewards_BG = torch.tensor(correct).view(-1, group)
        centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
        advantages_B = (centred_BG / (rewards_BG.std(1, keepdim=True) + 1e-6)).view(-1)
        mask_BR = responses_BR != tokenizer.pad_token_id
        logp_BR = response_logprobs(model, prompts_BP, responses_BR)
        loss = -(logp_BR * advantages_B.unsqueeze(1) * mask_BR).sum() / mask_BR.sum()
        _step(model, optimizer, loss)
        on_step(step, rewards_BG.mean().item())


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
