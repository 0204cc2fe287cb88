"""ISOPO inside autograd: its gradients for any `nn.Module`, in the one backward pass that computes gradients anyway.

    isopo = Isopo(policy, NTK(damping=1.0))
    with isopo.microbatch(advantages):
        (-policy.log_prob(batch).sum()).backward()       # unweighted: the advantages enter through the coefficients
    optimizer.step()
    isopo.end_step()

The way of a gradient through this room:

1. `stand_in`: while a microbatch is open, a stand-in takes the place of every trainable parameter (where: `places`, and
   `recurrent_modules`);
2. `layer_functions`: it sends each use (`F.linear`, `F.embedding`, …) to one of the `handlers`, which computes the same
   forward and keeps the two factors of the weight's gradient in the backward pass instead of multiplying them; what no
   handler covers goes to the `fallback`, where each sequence gets one of the `copies` of the parameter;
3. `parameter_gradients`, `layer_gradients`: the gradients of each sequence, factored; the Gram matrix of a layer, by
   the way that `path_costs` names, with the `resources` that all layers share;
4. `transforms`: from Gram matrix and advantages to the coefficients c, one a sequence;
5. `microbatch`: when all uses of a layer were seen, Σ_s c_s G_s is handed to autograd, which adds it to `.grad`.

`segments` knows whose the rows of an input are where its first axis is not the sequences, `sharded` where the values
are of parameters that FSDP2 keeps in parts. `graph`, `in_place`, `loss_scale` and `sequence_axis` notice what would
make the result wrong and name it; `verification` compares the whole with autograd, on your model.
"""

from isopo_mini.engine.grams_alone import gram_matrices
from isopo_mini.engine.isopo import Isopo
from isopo_mini.engine.layer_functions import matrix_product, scale_and_shift, table_lookup
from isopo_mini.engine.moving_averages import MovingAverages
from isopo_mini.engine.places import layer_names
from isopo_mini.engine.stand_in import UnhandledParameterError, register
from isopo_mini.engine.transforms import NTK, FisherNormalized, LayerScaled, Transform
from isopo_mini.engine.verification import verify

__all__ = [
    "NTK",
    "FisherNormalized",
    "Isopo",
    "LayerScaled",
    "MovingAverages",
    "Transform",
    "UnhandledParameterError",
    "gram_matrices",
    "layer_names",
    "matrix_product",
    "register",
    "scale_and_shift",
    "table_lookup",
    "verify",
]
