"""The contract of every op: its schema, and what it does to shapes and dtypes (nothing: all results are in place).

Conventions shared by all ops
    lists       one entry per parameter, all lists of a call equally long; an optional list is empty when absent. A
                parameter that was not perturbed is its own backup, and without a first gradient its gradient is both.
                perturb_ may be given a gradient as the backup, too: then the weights take its place.
    hyper       hyperparameters are float64 tensors with one row per group of consecutive parameters; ``group_sizes``
                says how many parameters each row covers.
    stats       float64 ``[norm, inverse, non_finite, non_finite_count, ticket, squared_norm]``: the gradient norm,
                ``1 / (norm + 1e-12)`` or 0 where there is no direction, whether the norm was not finite, how often that
                happened so far, 0 (a counter for the blocks of GPU kernels, which reset it to 0), and the sum of
                squares of which the norm is the root.
    squares     float64: sums of squares, the squared_norm of several stats, which finish_norm adds in their order.
    masters     fp32 copies of bfloat16/float16 parameters, which take the place of backups; or, all of them int16, the
                remainders that bfloat16 parameters (and their backups) lack to be fp32: see rst_fused.reference.join.
                In grad_norm a parameter without a master stands for it. An update without backups or copies starts from
                the parameters: a step without a perturbation.
    rng         int64 ``[seed, step]``: stochastic rounding is a pure function of both and of the element's position.
                An update that is given it rounds the first list of its state stochastically where that is bfloat16,
                which it may be wherever the arithmetic is in float32 (float32 and bfloat16 parameters, and those with
                masters). Its bits are never those of perturb_.
    indices     the position of each parameter among all of the model, from 0 to 2^31 - 1, which picks these bits; empty
                for positions in the lists.
    shards      where the elements of each parameter are in a whole tensor of which it is a shard, so that random bits
                are those of the whole: empty for whole tensors, or ``offset, run, stride`` per parameter, numbers >= 0.
                Element i, in the order of the parameter's strides, is at ``offset + i // run * stride + i % run``; a
                run of 0 stands for all elements, at ``offset + i``.
    state       what the base optimizer keeps; an empty momentum_buffers is SGD without momentum, a non-empty
                max_exp_avg_sqs is AMSGrad.
    first_grads the gradients of the first pass, for G-RST; empty for RST, which uses the second pass alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "rst_fused"
SGD_HYPER = ("lr", "momentum", "dampening", "weight_decay", "gamma")
ADAM_HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "gamma")
LION_HYPER = ("lr", "beta1", "beta2", "weight_decay", "gamma")
STATS = ("norm", "inverse", "non_finite", "non_finite_count", "ticket", "squared_norm")

_UPDATE = "(Tensor(a!)[] params, Tensor[] grads, Tensor[] backups, Tensor[] first_grads, "
_AMP = "bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? rng, int[] indices, int[] shards) -> ()"

SCHEMAS = {
    "grad_norm": "(Tensor(a!) stats, Tensor[] grads, Tensor[] params, Tensor[] masters, bool adaptive, "
    "float eta) -> ()",
    "finish_norm": "(Tensor(a!) stats, Tensor squares) -> ()",
    "perturb_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] backups, Tensor[] masters, Tensor stats, "
    "Tensor rho, int[] group_sizes, bool adaptive, float eta, bool stochastic, Tensor rng, int first_index, "
    "int[] shards) -> ()",
    "restore_": "(Tensor(a!)[] params, Tensor[] backups, Tensor[] masters, Tensor(b!)[] grads, Tensor[] first_grads, "
    "Tensor gamma, int[] group_sizes) -> ()",
    "restore_sgd_step_": _UPDATE + "Tensor(b!)[] momentum_buffers, Tensor(c!)[] masters, Tensor hyper, "
    "int[] group_sizes, bool nesterov, " + _AMP,
    "restore_adam_step_": _UPDATE + "Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, "
    "Tensor(e!)[] masters, Tensor hyper, Tensor steps, int[] group_sizes, bool decoupled, " + _AMP,
    "restore_lion_step_": _UPDATE + "Tensor(b!)[] exp_avgs, Tensor(c!)[] masters, Tensor hyper, "
    "int[] group_sizes, " + _AMP,
}

OPAQUE_NAMESPACE = "rst_fused_reference"  # the same ops in plain torch: see rst_fused._backends
TRITON_NAMESPACE = "rst_fused_triton"  # and in rst_fused.kernels

_libraries = {name: torch.library.Library(name, "DEF") for name in (NAMESPACE, OPAQUE_NAMESPACE, TRITON_NAMESPACE)}


def _fake(*args: object) -> None:
    """Every op returns nothing and changes no shape."""


for _namespace, _library in _libraries.items():
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{_namespace}::{_name}", _fake, lib=_library)


def implement(namespace: str, name: str, function: Callable[..., None]) -> None:
    """Makes a Python function the kernel of an op, on every device."""
    _libraries[namespace].impl(name, function, "CompositeExplicitAutograd")
