"""Layers whose filter is expanded from a smaller weight; in eval mode the filter is kept until the weight changes."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gzoo.bases import Basis, expand
from gzoo.nn.constant import Constants, on_default_device


class ExpandedLayer(Constants):
    """Holds kernels ``weight`` and gives the `filter` that they expand to.

    The filter is computed anew wherever a gradient may flow or a compiler looks on. Else it is cached: it survives
    until the weight or its memory is replaced, changes in place (torch counts that), moves, changes dtype, or the
    module is copied or switched between train and eval. Torch does not count edits in place through ``weight.data``,
    nor those of another process or of a fused optimizer after a forward without gradients; call ``eval()`` after one.
    """

    constants: ClassVar[tuple[str, ...]] = ("index", "samples")
    precise: ClassVar[tuple[str, ...]] = ("samples",)
    weight: nn.Parameter
    index: Tensor
    samples: Tensor | None

    def __init__(self, out_fields: int, in_fields: int, basis: Basis) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_fields, in_fields, *basis.parameters))
        self.kernel_size, self.basis_name = basis.size, basis.name
        # Not in the state_dict: they follow from the group and the kernel size.
        samples = None if basis.samples is None else on_default_device(basis.samples)
        self.register_buffer("index", on_default_device(basis.source), persistent=False)
        self.register_buffer("samples", samples, persistent=False)
        self._cached: tuple[Tensor, int, Tensor | None, Tensor] | None = None  # weight, its version and memory, filter

    def filter(self) -> Tensor:
        """The expanded filter, (channels out, channels in, k, k)."""
        weight = self.weight
        if self.training or torch.compiler.is_compiling() or torch.jit.is_tracing() or weight.is_inference():
            return expand(weight, self.basis)
        if torch.is_grad_enabled() and weight.requires_grad:
            self._cached = None  # a step may follow, and fused optimizers change weights without counting it
            return expand(weight, self.basis)
        if self._cached is None or not _is_as_it_was(weight, *self._cached[:3]):
            # A tensor made in inference mode could not serve a gradient with respect to x later, nor one of autocast's
            # dtype a call without autocast.
            device = weight.device.type
            full = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
            with torch.inference_mode(False), torch.no_grad(), full:
                # The memory is held, or what takes its place could get the same address. Tensors that torch.func or
                # DTensor wrap have none.
                memory = weight.detach() if type(weight) is nn.Parameter else None
                self._cached = weight, weight._version, memory, expand(weight, self.basis)
        return self._cached[3]

    @property
    def basis(self) -> Basis:
        """How the weight expands, on the weight's device."""
        device, samples = self.weight.device, self.samples
        samples = None if samples is None else samples.to(device)
        return Basis(tuple(self.weight.shape[2:]), self.index.to(device), samples, self.kernel_size, self.basis_name)

    def train(self, mode: bool = True) -> "ExpandedLayer":
        self._cached = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ExpandedLayer":
        self._cached = None  # .to(), .half(), .cuda(): same version, new data
        # In two dimensions: .to(memory_format=torch.channels_last) rejects kernels, whose dimensions are no image's.
        super()._apply(lambda x: fn(x.flatten(1)).view(x.shape) if x.ndim > 2 else fn(x), recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:  # deepcopy and pickle
        return {**self.__dict__, "_cached": None}


def _is_as_it_was(weight: Tensor, before: Tensor, version: int, memory: Tensor | None) -> bool:
    """Whether nothing has changed that shows.

    nn.utils.vector_to_parameters and torch.utils.swap_tensors give a parameter other memory, which torch does not
    count.
    """
    if weight is not before or weight._version != version:
        return False
    return memory is None or weight.data_ptr() == memory.data_ptr()


def along_fibre(numbers: Tensor, order: int, dim: int = 0) -> Tensor:
    """One number a field, (fields, ...), to one a channel, (fields * order, ...); or along another dimension.

    A stack, because torch.compile of torch 2.5 to 2.7 takes no view as the bias of a convolution, such as
    `repeat_interleave` becomes there, and ONNX none of those without a dimension.
    """
    return torch.stack(order * [numbers], dim + 1).flatten(dim, dim + 1)
