"""Rollouts from vLLM, running in the learner's process on the learner's device.

Every rank holds one complete engine (tensor parallel size 1) and samples its own prompts. Building an engine
is collective over the default process group; `generate` and `load_weights` are not, apart from what the
iterator of weights itself does.

Checked against vLLM 0.32 on a CPU in float32, where the returned logprobs agree with a float32 Hugging Face
forward within 1e-4 nats. The GPU settings follow vLLM 0.32's sources and have not been run on a GPU.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tcopd_fast.config_sections import RolloutConfig
from tcopd_fast.errors import UserError
from tcopd_fast.models import resolve_path
from tcopd_fast.rollout import response_limit
from tcopd_fast.timeline import Span
from tcopd_fast.types import Prompt, Rollout

# vLLM samples at 0.01 when asked for less, and refuses more than 2.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0


class VllmEngine:
    """A `RolloutEngine` on vLLM.

    version: number of the last weight sync, 0 before the first.

    model_path: Hugging Face id, local folder or miniature:NAME, with safetensors weights. tokenizer: decodes
    responses; its EOS and those of the checkpoint's generation config end a response. No other setting of
    that generation config (top-k, top-p, penalties, temperature) is used. dtype: "float32" or "bfloat16";
    logits are float32 with both. max_model_len: most tokens of prompt and response together. device: the
    learner's; on "cuda" it must be the process's current device. vocab_size: sample only from this many
    leading rows of the head (None: from all).

    The constructor raises RuntimeError when torch.distributed is not initialised or vLLM did not join its
    group, UserError when vLLM refuses the model or the settings. It leaves the caller's random state alone.
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: RolloutConfig,
        dtype: str,
        max_model_len: int,
        seed: int,
        device: torch.device,
        vocab_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "VllmEngine: torch.distributed is not initialised; call deepspeed.init_distributed() first "
                "(an engine built before it would take the process group for its own, with a world of 1)"
            )
        self.version = 0
        self.apart = False
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._device = device
        self._sleeps = config.vllm.sleep and device.type == "cuda"
        self._asleep = False
        on_cpu = device.type == "cpu"
        _set_environment(device)
        with _caller_state_kept(device), _reloadable_cpu_linears(on_cpu), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            from vllm import LLM
            from vllm.distributed.parallel_state import get_tp_group, get_world_group

            memory: dict[str, Any] = (
                {
                    "enforce_eager": True,
                    "kv_cache_memory_bytes": config.vllm.kv_cache_memory_bytes,
                    # vLLM rewinds the generator of a seeded request whose prompt it took in parts; a CPU's cannot be
                    # rewound.
                    "enable_chunked_prefill": False,
                }
                if on_cpu
                else {
                    "enforce_eager": config.vllm.enforce_eager,
                    "gpu_memory_utilization": config.vllm.gpu_memory_utilization,
                    "enable_sleep_mode": config.vllm.sleep,
                }
            )
            try:
                self._llm = LLM(
                    model=resolve_path(model_path),
                    skip_tokenizer_init=True,
                    trust_remote_code=trust_remote_code,
                    load_format="safetensors",
                    use_tqdm_on_load=False,
                    dtype=dtype,
                    # As the learner's head: bfloat16 logits would shift every logprob.
                    hf_overrides={"head_dtype": "float32"},
                    seed=seed,
                    max_model_len=max_model_len,
                    max_num_seqs=config.vllm.max_num_seqs,
                    generation_config="vllm",
                    logprobs_mode="processed_logprobs",
                    distributed_executor_backend="external_launcher",
                    tensor_parallel_size=1,
                    **memory,
                )
            except ValueError as error:
                raise UserError(
                    f"rollout.engine=vllm, model {model_path}: vLLM refuses to start: {_reason(error)}"
                ) from error
        # Left in place, this finalizer destroys torch's default process group, the learner's, when the engine
        # is garbage collected.
        self._llm.llm_engine.engine_core._finalizer.detach()
        world, tensor_parallel = get_world_group().world_size, get_tp_group().world_size
        if (world, tensor_parallel) != (dist.get_world_size(), 1):
            raise RuntimeError(
                f"VllmEngine: vLLM sees {world} ranks in tensor parallel groups of {tensor_parallel}; "
                f"expected {dist.get_world_size()} ranks and groups of 1"
            )
        if vocab_size is not None:
            self._llm.apply_model(partial(cut_vocabulary, vocab_size=vocab_size))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        on_finished: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Sample as `RolloutEngine.generate` says; `on_finished` is called while other responses still run.

        Every (prompt id, sample) draws from a stream of its own, derived from `seed`. Equal weights, prompts
        and seed repeat the samples as long as batching leaves vLLM's logits bitwise equal, which they are on
        a CPU for an equal call.

        logprobs: log softmax(logits / temperature) at the sampled id; at temperature 0, log softmax(logits).
        Raises UserError for a prompt that leaves no room for `max_new_tokens`, and for a temperature that
        vLLM would replace by another.
        """
        check_request(prompts, max_new_tokens, temperature, self._max_model_len)
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        eos = self._tokenizer.eos_token_id
        rollouts: list[Rollout | None] = [None] * (len(prompts) * samples)
        requests: list[str] = []
        # With enforce_eager the one thing vLLM still compiles is a helper that ranks tokens, unused here:
        # on a CPU that would cost 11 s and a C++ compiler at first use.
        eager = torch.compiler.set_stance("force_eager") if self._device.type == "cpu" else nullcontext()
        with _rng_kept(self._device), eager:
            try:
                for index in range(len(rollouts)):
                    position, sample = divmod(index, samples)
                    prompt = prompts[position]
                    params = SamplingParams(
                        temperature=temperature,
                        top_p=1.0,
                        top_k=0,
                        max_tokens=response_limit(prompt, max_new_tokens),
                        seed=stream_seed(seed, prompt.id, sample),
                        # vLLM adds the EOS ids of the checkpoint's generation config to these.
                        stop_token_ids=[] if eos is None else [eos],
                        logprobs=0,
                        flat_logprobs=True,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    tokens = tokens_input(list(prompt.token_ids))
                    requests.append(engine.add_request(str(index), tokens, params))
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        index = int(output.request_id)
                        position, sample = divmod(index, samples)
                        rollout = self._rollout(prompts[position], sample, output.outputs[0])
                        rollouts[index] = rollout
                        if on_finished is not None:
                            on_finished(rollout)
            finally:
                # After an error the rest must not run into the next call's results.
                engine.abort_request(requests, internal=True)
        return [rollout for rollout in rollouts if rollout is not None]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights in place, drop the KV cache of the old ones, and stamp `version`.

        weights: (Hugging Face name, tensor of the full shape, any dtype and device), consumed one at a time
        and completely. A tied lm_head.weight may be present or absent. Raises RuntimeError when a parameter
        of the model received nothing, since it would keep its old value; ValueError (from vLLM) for a name
        the model lacks. After an error the weights are a mixture and the version is the old one.
        """

        def copy_into(model: nn.Module) -> set[str]:
            with torch.no_grad():
                loaded = model.load_weights(weights)  # type: ignore[operator]
            return {name for name, _ in model.named_parameters()} - loaded

        if self._asleep:
            # The KV cache comes back only when the weights are there, since gathering them takes memory too.
            self._llm.wake_up(tags=["weights"])
        (missing,) = self._llm.apply_model(copy_into)
        if missing:
            raise RuntimeError(f"weight sync {version}: no weights for {', '.join(sorted(missing))}")
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.llm_engine.reset_prefix_cache():
            raise RuntimeError(f"weight sync {version}: vLLM kept the KV cache of the old weights")
        self.version = version

    def metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def spans(self, until: float) -> dict[str, list[Span]]:
        """None: it generates in its rank's rollout stage."""
        return {}

    def sleep(self) -> None:
        """On a GPU (with `rollout.vllm.sleep`) free weights and KV cache; the next `load_weights` brings them back."""
        if self._sleeps and not self._asleep:
            # Level 2 keeps no copy of the weights: the next ones come from the learner.
            self._llm.sleep(level=2)
            self._asleep = True

    def close(self) -> None:
        """Free weights and KV cache, leaving the learner's process group alone; another engine may follow."""
        import vllm.v1.engine.core as engine_core

        # vLLM's shutdown ends by destroying torch's default process group, which is the learner's here.
        with patch.object(engine_core, "cleanup_dist_env_and_memory"):
            self._llm.llm_engine.engine_core.engine_core.shutdown()
        del self._llm
        gc.collect()
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()

    def _rollout(self, prompt: Prompt, sample: int, completion: Any) -> Rollout:
        """One finished vLLM CompletionOutput as a Rollout."""
        token_ids, reason = tuple(completion.token_ids), completion.finish_reason
        logprobs = completion.logprobs
        if reason not in ("stop", "length") or tuple(logprobs.token_ids) != token_ids:
            raise RuntimeError(
                f"prompt {prompt.id!r}: vLLM ended a response as {reason!r} with {len(token_ids)} tokens "
                f"and {len(logprobs.token_ids)} logprobs"
            )
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=token_ids,
            logprobs=torch.tensor(logprobs.logprobs, dtype=torch.float32),
            finish_reason=reason,
            version=self.version,
            text=self._tokenizer.decode(list(token_ids), skip_special_tokens=True),
        )


def check_request(prompts: Sequence[Prompt], max_new_tokens: int, temperature: float, max_model_len: int) -> None:
    """Refuse what vLLM would cut short or sample otherwise than asked. Raises UserError."""
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise UserError(
            f"rollout.temperature={temperature}: vLLM samples at 0 (greedy) or from {MIN_TEMPERATURE} to "
            f"{MAX_TEMPERATURE:g}; choose one of these or rollout.engine=hf"
        )
    for prompt in prompts:
        if len(prompt.token_ids) + max_new_tokens > max_model_len:
            raise UserError(
                f"prompt {prompt.id!r} of {prompt.source}: {len(prompt.token_ids)} tokens and a response "
                f"of {max_new_tokens} exceed the {max_model_len} the vLLM engine is built for; "
                "lower data.max_prompt_tokens or the response length"
            )


def _set_environment(device: torch.device) -> None:
    """What vLLM reads from the environment, at import and when the engine is built."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # The external launcher takes rank and device from here; a single process may run without a launcher.
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))


def stream_seed(seed: int, prompt_id: str, sample: int) -> int:
    """62-bit seed of one response."""
    digest = hashlib.blake2b(f"{seed}/{sample}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def cut_vocabulary(model: nn.Module, vocab_size: int) -> None:
    """Make vLLM drop the logits past `vocab_size`, where it already drops its own padding."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.org_vocab_size = min(module.org_vocab_size, vocab_size)


def _reason(error: ValueError) -> str:
    """vLLM's complaint without pydantic's framing."""
    if isinstance(error, ValidationError):
        return "; ".join(item["msg"] for item in error.errors())
    return str(error)


@contextmanager
def _reloadable_cpu_linears(on_cpu: bool) -> Iterator[None]:
    """Keep vLLM's CPU linears unpacked while a model is built.

    On a CPU vLLM repacks each linear's weight for its GEMM kernel after loading and drops the original, so a
    later load_weights raises, or (tied head) fills a tensor the kernel no longer reads and changes nothing.
    With a plain F.linear on layer.weight the next forward sees every sync, at the price of slower CPU GEMMs.
    """
    if not on_cpu:
        yield
        return
    import vllm.model_executor.layers.utils as layer_utils

    with patch.object(layer_utils, "dispatch_cpu_unquantized_gemm", _plain_linear):
        yield


def keep_cpu_linears_plain() -> None:
    """The same for the rest of this process's life."""
    import vllm.model_executor.layers.utils as layer_utils

    layer_utils.dispatch_cpu_unquantized_gemm = _plain_linear


def _plain_linear(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]


@contextmanager
def _rng_kept(device: torch.device) -> Iterator[None]:
    """Restore the state of random, numpy, torch and `device`: vLLM reseeds them all when an engine is built,
    and its CPU sampler draws from torch's global generator."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _caller_state_kept(device: torch.device) -> Iterator[None]:
    """Undo what building an engine changes for the rest of the process: the random state;
    torch.set_num_threads, which the CPU worker disables; LOCAL_WORLD_SIZE, which becomes 1; LD_PRELOAD, which
    later child processes read."""
    names = ("LOCAL_WORLD_SIZE", "LD_PRELOAD")
    set_num_threads, variables = torch.set_num_threads, {name: os.environ.get(name) for name in names}
    try:
        with _rng_kept(device):
            yield
    finally:
        torch.set_num_threads = set_num_threads
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
