"""How the trainer's weights, or its adapters alone, get into vLLM's offline engine (vllm.py)."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ...schemas.errors import EngineEnded, InputError
from ...trace.lora import AdapterForm
from ...trace.protocols import TrainedPolicy
from .weights import engine_rank, memory_folder, weights_bytes, write_adapters, write_weights

Ask = Callable[..., Any]  # (function of the engine, arguments) -> its answer


def load_weights(ask: Ask, llm: Any, policy: TrainedPolicy, model: str, in_process: bool) -> None:
    """Reload all weights. model: the folder of the engine's model.

    vLLM's own load_weights is not enough: on CPU the engine computes with copies of the weights in
    another layout, which only a reload renews.
    """
    if in_process:
        ask(llm.collective_rpc, "reload_weights", kwargs={"weights_iterator": policy.weights()})
        return
    with _room(weights_bytes(model, policy.compute_dtype)) as folder:
        write_weights(policy, folder)
        ask(llm.collective_rpc, "reload_weights", kwargs={"weights_path": str(folder)})


def load_adapters(ask: Ask, llm: Any, policy: TrainedPolicy, form: AdapterForm, before: Any) -> Any:
    """Load adapters under the next version's name and number, in place of those before.

    before: the LoRARequest that the last call returned, or None. Requests name the new one.

    Raises:
        InputError: vLLM can't load them.
    """
    engine, version = llm.llm_engine, 1
    if before is not None:
        version = before.lora_int_id + 1
        ask(engine.remove_lora, before.lora_int_id)
    with _room(0) as folder:
        write_adapters(policy, form, folder)
        request = import_module("vllm.lora.request").LoRARequest
        loaded = request(f"adapters-{version}", version, str(folder))
        try:
            ask(engine.add_lora, loaded)
        except EngineEnded:
            raise
        except Exception as error:  # vLLM's process sends every error as a bare Exception
            raise InputError(
                f"sampler vllm: can't load the adapters ({str(error).splitlines()[0]:.200}); set "
                "sampler.adapters=merge, or other lora.target_modules"
            ) from None
    return loaded


def adapter_options(form: AdapterForm | None) -> dict[str, Any]:
    """vLLM's options for one set of adapters at a time; none without.

    Raises:
        InputError: their rank is above vLLM's limit.
    """
    if form is None:
        return {}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": engine_rank(form),
        # Without this vLLM wraps the head too, and can't score prompts on CPU.
        "lora_target_modules": list(form.modules),
    }


@contextmanager
def _room(needed: int) -> Iterator[Path]:
    """The path of a folder to make in shared memory, for a while. needed: bytes."""
    room = memory_folder(needed)
    try:
        yield room / "weights"
    finally:
        shutil.rmtree(room)
