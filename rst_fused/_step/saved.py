"""What of an optimizer outlives a step, a load and the process; and what is made anew then."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from rst_fused._step import placeholders, release
from rst_fused._step import state_dict as saving
from rst_fused._step.base import StepOptimizer
from rst_fused._step.devices import DeviceState, device_states_for
from rst_fused._step.plan import PlanCache
from rst_fused._step.sharding import Sharding
from rst_fused._step.state import StepState


class SavedOptimizer(StepOptimizer):
    """An optimizer with a state_dict, that can be pickled."""

    requested_backend: str

    def _adopt(self) -> None:
        """Follows the base optimizer, whose groups and state are replaced when it loads a state_dict."""
        if self.base is None:
            return
        self.param_groups, self.state = self.base.param_groups, self.base.state
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])
            saving.reserve_counters(group)

    def _reset(self, step_state: StepState) -> None:
        """Nothing of a step under way is ever saved: neither backups nor launch plans."""
        self._step_state = step_state
        self._plans = PlanCache()

    def _set_devices(self, known: list[DeviceState]) -> None:
        self._devices = device_states_for(known, self.param_groups, self.requested_backend, self.seed)
        self._on_gpu = any(state.device.type == "cuda" for state in self._devices)
        self._sharding = Sharding(())
        self._find_sharding()

    def _refuse_while_perturbed(self, what: str) -> None:
        if self._step_state.perturbed:
            raise RuntimeError(
                f"{what} while the weights are perturbed: call step() after the second backward, or restore() to undo"
            )
        if self._step_state.released and what != "perturb":
            raise RuntimeError(
                f"{what} in the middle of a step, whose backward has updated parameters (release_gradients=True): call "
                "step() first, or restore() to abandon the step"
            )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim; the counters travel in the param_groups. Raises RuntimeError while perturbed."""
        self._refuse_while_perturbed("state_dict")
        self._adopt()
        return saving.completed(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes bit-exactly. Also takes the state of the torch.optim optimizer that the base is named after."""
        self._refuse_while_perturbed("load_state_dict")
        self._adopt()
        rhos = [group["rho"] for group in self.param_groups]
        given: list[dict[str, Any]] = []  # what the pre-hooks make of state_dict

        def receive(_: Optimizer, state: dict[str, Any]) -> None:
            saving.check(self, state)
            given.append(state)

        handle = self.register_load_state_dict_pre_hook(receive)
        try:
            super().load_state_dict(state_dict)
            if self.base is not None:
                self.base.load_state_dict(given[0])
        finally:
            handle.remove()
            self._adopt()  # the groups and the state of the base, whether it took the new ones or not
        if self.rule is not None:
            saving.adapt(self, given[0])
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)
        self._reset(saving.take_counters(self))
        placeholders.note_zeros(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("pickling or copying")
        return saving.for_pickle(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "requested_backend" in state:  # unpickled or copied, rather than loading a state_dict
            stats, counts = vars(self).pop("_saved_stats"), vars(self).pop("_saved_counts")
            self._reset(StepState(*counts))
            self._adopt()
            self._set_devices([])
            self._releases = release.Releases()
            release.watch(self)
            self._devices[0].stats[: len(stats)].copy_(stats)  # older ones have fewer numbers
            placeholders.note_zeros(self)
