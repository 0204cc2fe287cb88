"""`Isopo`: opens a microbatch on a model, and closes a step. What happens in between is told in `isopo_mini.engine`.

It is exact for models whose sequences do not influence one another and are the first axis of every layer's input; not
every breach of that can be seen from inside. What would escape the engine is an error with the name of the parameter.
Run `verify` once on a new model: it compares the engine with autograd.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from isopo_mini import checks
from isopo_mini.engine import (  # noqa: F401  (importing registers them)
    attention_handler,
    convolution_handlers,
    handlers,
    product_handlers,
    recurrent_handlers,
)
from isopo_mini.engine.across_ranks import GatheredGradients, Ranks
from isopo_mini.engine.blocks import Blocks
from isopo_mini.engine.fallback import MAX_BYTES, Fallback
from isopo_mini.engine.layer_gradients import LayerGradients
from isopo_mini.engine.loss_scale import check_loss_scale, grad_scaler_noticed
from isopo_mini.engine.microbatch import Microbatch, Uses
from isopo_mini.engine.moving_averages import MovingAverages, end_step_of
from isopo_mini.engine.places import layer_names
from isopo_mini.engine.resources import PATHS, Resources
from isopo_mini.engine.segments import Segments
from isopo_mini.engine.transforms import Transform
from isopo_mini.engine.workspace import Workspace


class Isopo:
    """Replaces, layer by layer, Σ_s G_s by Σ_s c_s G_s inside the backward pass.

    Args:
        model: any module whose layers keep the sequence axis first, inputs `(S, …, features)`, or flatten it in a way
            that can be followed; see `segments`.
        transform: `NTK(…)`, `FisherNormalized(…)` or `LayerScaled()`.
        gram: how the Gram matrix of a weight is made. Exactly: `"dense"`, `"ghost"`, or `"auto"`, whichever of the two
            takes less time, by the multiplications and the memory it goes through. As an estimate: `"sketched"`, from
            Gaussian projections, or `"signs"`, from sums with random signs, faster and closer; see
            `geometry.sketches`. `"fast"`: as with `"auto"`, but by `"signs"` where that takes less than half the time;
            and for many sequences the NTK's c without K, from some products with G, to about 1 % of its length.
        gram_bytes: with `"auto"`, what all the G_s of a weight may take together; where they would take more, the path
            is `"ghost"`. None: as much as they need.
        sketch_size: k of the estimates.
        layers: `"separate"`: one set of coefficients a layer. `"together"`: one for the whole model, from the sum of
            all Gram matrices; backpropagation then holds every layer's factors until its end.
        process_group: of `torch.distributed`, whose processes share Gram matrices: with R processes of s sequences each
            takes the step of one process with R·s. Needs a sketch, `gram="sketched"` or `"signs"`; see `across_ranks`.
            Without one (None) each process has its own Gram matrices.
        decay: of the moving averages.
        seed: of the sketches and of the sampled tokens; the same in all processes of the group.
        copy_bytes: where no handler covers what is done with a parameter, each sequence gets a copy of it, as long as
            the copies of one parameter take no more than this; 0 refuses such uses.

    Raises:
        ValueError: an unknown option, a process group with another `gram`, or a model without trainable parameters.

    Under `DistributedDataParallel` give the inner module, under FSDP2 the one that `fully_shard` was given. Each rank
    transforms its own microbatch, or with a process group all of them one; then gradients are averaged over the ranks
    as always: pass A/s, s the sequences of a process.
    """

    def __init__(
        self,
        model: nn.Module,
        transform: Transform,
        *,
        gram: str = "auto",
        gram_bytes: int | None = None,
        sketch_size: int = 32,
        layers: str = "separate",
        process_group: ProcessGroup | None = None,
        decay: float = 0.9,
        seed: int = 0,
        copy_bytes: int = MAX_BYTES,
    ) -> None:
        checks.require_at_least("copy_bytes", copy_bytes, 0)
        checks.require_choice("gram", gram, PATHS)
        checks.require_choice("layers", layers, ("separate", "together"))
        checks.require_at_least("sketch_size", sketch_size, 1)
        if process_group is not None and gram not in ("sketched", "signs"):
            raise ValueError(
                f"gram: expected 'sketched' or 'signs' with a process group, since sketches travel, got '{gram}'"
            )
        self.model = model
        self.transform = transform
        if gram_bytes is not None:
            checks.require_at_least("gram_bytes", gram_bytes, 0)
        self.gram = gram
        self.gram_bytes = gram_bytes
        self.sketch_size = sketch_size
        self.layers = layers
        self.ranks = None if process_group is None else Ranks(process_group)
        self._decay = decay
        self._seed = seed
        self._averages: dict[str, MovingAverages] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._workspace = Workspace()
        self._fallback = Fallback(copy_bytes)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model: expected at least one trainable parameter, got none")

    @contextmanager
    def microbatch(
        self,
        advantages: Float[Tensor, "S"],
        mask: Bool[Tensor, "S T"] | None = None,
        *,
        loss_scale: float | Float[Tensor, ""] = 1.0,
        segments: Int[Tensor, "..."] | None = None,
        block_size: int | None = None,
    ) -> Iterator[Microbatch]:
        """Open a microbatch: run the forward and the backward pass inside the `with` block.

        Differentiate the *unweighted* sum of log-probabilities (or minus it, for an optimizer that minimises).
        Afterwards `.coefficients` of the yielded object holds each layer's c.

        Args:
            advantages: A, one a sequence. The step is linear in them: pass A/S for a mean over sequences.
                (Where `"fast"` forms no K it only scales with them.)
            mask: the positions that the token-sampled Fisher norm may draw; all positions when None.
            segments: for packed sequences, several in a row: the sequence of every token, from 0 to S − 1 or negative
                for padding that has no part in the loss. It has the shape of the tokens, `(1, N)` or `(R, T)`. No layer
                may mix the sequences of a row; an attention is told their `position_ids`. `verify` can check it.
            loss_scale: s > 0, where s times that sum is differentiated. `.grad` is then s times the step. The engine
                cannot see s; untold, it would make of a Fisher-normalised step, divided by s again, s⁻² times that
                step. Do not count a `torch.amp.GradScaler`: its method `scale` is noticed inside the block.
            block_size: how many sequences share a Gram matrix, one after another: the step of as many microbatches of
                this size as there are, in one pass. All of them when None. Under the NTK, blocks of one size share
                their sketches.

        Raises:
            ValueError: advantages are not a finite floating `(S,)`; a layer's input does not have S first, or has rows
                of other sequences there; sequences are in another order, or in a batch normalisation; the loss has a
                trainable parameter that the model has not; a parameter was exchanged, as `torch.func.functional_call`
                does, or is on the meta device, or is used as the shard of it that a process has; the loss scale is not
                positive; the block size is less than 1, or given with a process group.
            UnhandledParameterError: a trainable parameter is used in a way that no handler covers.
            RuntimeError: a microbatch of this model is open already; a parameter was replaced; what a use kept was
                changed in place; a checkpoint is re-entrant; a backward pass stopped halfway, was a second one for
                what the microbatch had computed, or ran after the block.
        """
        sizes = checks.require_shape("advantages", advantages, "S")
        checks.require_not_empty("advantages", advantages)
        checks.require_floating("advantages", advantages)
        checks.require_finite("advantages", advantages)
        if mask is not None:
            checks.require_shape("mask", mask, "S T", sizes)
        check_loss_scale(loss_scale)
        advantages = advantages.detach()
        packed = None if segments is None else Segments.checked(segments, len(advantages))

        blocks = self._blocks(len(advantages), block_size, mask, loss_scale)
        resources = blocks.resources[0]
        ranks = self.ranks
        all_advantages = advantages if ranks is None else ranks.all_advantages(advantages)

        def note_scaler(scale: Tensor) -> None:
            for of_block in blocks.resources:
                of_block.loss_scale = loss_scale * scale

        def close_layer(name: str, uses: Uses) -> dict[str, Tensor]:
            if len(blocks.places) > 1:
                of_layers[name], combined = blocks.gradients(uses, self.transform, advantages, self.averages(name))
                return combined
            gradients = LayerGradients(uses, resources)
            asked = gradients if ranks is None else GatheredGradients(gradients, ranks)
            coefficients = self.transform.coefficients(asked, all_advantages, self.averages(name))
            coefficients = coefficients if ranks is None else ranks.own(coefficients)
            of_layers[name] = coefficients
            return gradients.combine(coefficients)

        of_layers: dict[str, Tensor] = {}
        microbatch = Microbatch(
            self.model, self.layers, len(advantages), close_layer, of_layers, self._fallback, packed
        )
        try:
            with grad_scaler_noticed(note_scaler), microbatch.opened():
                yield microbatch
        except BaseException:
            for averages in self._averages.values():
                averages.forget_pending()
            raise

    def end_step(self) -> None:
        """Fold this optimizer step's values into the moving averages. Call it after `optimizer.step()`."""
        end_step_of(self._averages.values())

    def noted(self) -> dict[str, dict[str, Tensor]]:
        """What the transform noted since the last `end_step`: by the number's name, then by layer.

        Each is the mean over the microbatches. `NTK(spectra=True)` notes `"participation"` and `"damping_share"`.
        """
        numbers: dict[str, dict[str, Tensor]] = {}
        for layer, averages in self._averages.items():
            for name, value in averages.noted().items():
                numbers.setdefault(name, {})[layer] = value
        return numbers

    def copied(self) -> dict[str, str]:
        """The parameters of which each sequence got a copy so far, with the function that no handler covered."""
        return dict(self._fallback.used)

    def state_dict(self) -> dict[str, Tensor]:
        """The moving averages, as `{"layer/name": value}`, ready for safetensors."""
        return {
            f"{layer}/{name}": value.clone()
            for layer, averages in self._averages.items()
            for name, value in averages.history.items()
            if value.isfinite()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with saved moving averages.

        Raises:
            ValueError: a value is not a single finite number, or belongs to a layer that the model does not have.
        """
        layers = set(layer_names(self.model, self.layers).values())
        for key, value in state.items():
            checks.require_shape(f"state['{key}']", value, "")
            checks.require_finite(f"state['{key}']", value)
            if key.rpartition("/")[0] not in layers:
                raise ValueError(f"state: expected keys 'layer/name' of layers of this model, got '{key}'")
        self._averages.clear()
        for key, value in state.items():
            layer, name = key.rsplit("/", 1)
            self.averages(layer).history[name] = value

    def averages(self, layer: str) -> MovingAverages:
        """The moving averages of one layer."""
        return self._averages.setdefault(layer, MovingAverages(self._decay))

    def _blocks(self, sequences: int, size: int | None, mask: Tensor | None, loss_scale: float | Tensor) -> Blocks:
        """The blocks of a microbatch, one when no size is given."""
        if size is None:
            size = sequences
        checks.require_at_least("block_size", size, 1)
        if size < sequences and self.ranks is not None:
            raise ValueError(f"block_size: expected None with a process group, whose processes share one K, got {size}")
        places = [slice(start, min(start + size, sequences)) for start in range(0, sequences, size)]
        masks = [mask if mask is None else mask[place] for place in places]
        return Blocks(places, [self._resources(of_block, loss_scale) for of_block in masks])

    def _resources(self, mask: Tensor | None = None, loss_scale: float | Tensor = 1.0) -> Resources:
        """What the layers of one microbatch share."""

        def generator_of(device: torch.device) -> torch.Generator:
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(self._seed)
            return self._generators[device]

        return Resources(self.gram, self.sketch_size, self._workspace, generator_of, mask, loss_scale, self.gram_bytes)
