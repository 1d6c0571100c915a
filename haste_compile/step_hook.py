"""The denoising step as the host knows it: diffusers tells its stateful hooks, and this one listens.

The clock on the device needs no host (``haste_compile.clock``). But which *kernel* runs is the host's choice,
and dense warm-up steps ought to run the very kernel that a dense model runs. A pipeline enters
``transformer.cache_context(name, step_index=...)`` around every call; the hook keeps that context where the
backend's callable can read it, outside of the compiled graph.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

_NAME = "haste_step"
_hooks: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> the hook of its transformer


class StepHook:
    """Attached to one transformer; ``step`` is None where no pipeline tells it, as before diffusers 0.41."""

    def __init__(self, transformer: nn.Module) -> None:
        from diffusers.hooks import HookRegistry, ModelHook
        from diffusers.hooks.hooks import BaseState, StateManager

        class Hook(ModelHook):
            _is_stateful = True

            def __init__(self) -> None:
                super().__init__()
                self.state = StateManager(BaseState)

            def reset_state(self, module: nn.Module) -> nn.Module:
                self.state.reset()
                return module

        self._hook = Hook()
        self._registry: Any = HookRegistry.check_if_exists_or_initialize(transformer)
        self._registry.register_hook(self._hook, _NAME)
        self._parameters = [weakref.ref(parameter) for parameter in transformer.parameters()]
        for parameter in transformer.parameters():
            _hooks[parameter] = self

    @property
    def step(self) -> int | None:
        """0-based step of the call under way."""
        try:
            context = self._hook.state.context
        except ValueError:  # no context is set
            return None
        return getattr(context, "step_index", None)

    def detach(self) -> None:
        self._registry.remove_hook(_NAME, recurse=False)
        for reference in self._parameters:
            parameter = reference()
            if parameter is not None:
                _hooks.pop(parameter, None)


def find_hook(parameter: Any) -> StepHook | None:
    """The hook of the transformer that a parameter belongs to, if it has one."""
    return _hooks.get(parameter)
