"""The features of version 1 by name, in their order in the tensors, each with its meaning.

"Known" flags are 1 where the feature of the same name was measured and 0 where it was not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from esperml.v1 import graph_pb2

LAYER_TYPES: Final = {
    name.removeprefix("LAYER_TYPE_").lower(): value
    for name, value in graph_pb2.LayerType.items()
    if value != graph_pb2.LAYER_TYPE_UNSPECIFIED
}


def _with_flags(meanings: Mapping[str, str]) -> dict[str, str]:
    result: dict[str, str] = {}
    for name, meaning in meanings.items():
        result[name] = meaning
        result[f"{name}_known"] = f"whether {name} is known"
    return result


NODE_MEANINGS: Final[Mapping[str, str]] = {
    **{f"type_{name}": f"1 for a layer of type {name}" for name in LAYER_TYPES},
    "log_parameters": "number of own parameters; 1 at a million",
    "log_in_elements": "numbers in one sample's input; 1 at 10,000",
    "log_out_elements": "numbers in one sample's output; 1 at 10,000",
    "log_in_width": "channels or features of the input; 1 at 10,000",
    "log_out_width": "channels or features of the output; 1 at 10,000",
    "spatial_in": "1 where the input has more than one dimension",
    "spatial_out": "1 where the output has more than one dimension",
    "out_to_in_width": "log ratio of output to input width",
    "in_to_widest": "log ratio of input width to the widest input of the host",
    "in_to_narrowest": "log ratio of input width to the narrowest input of the host",
    "out_to_widest": "log ratio of output width to the widest output of the host",
    "out_to_host_input": "log ratio of output width to the width of the host's input",
    "out_to_host_output": "log ratio of output width to the width of the host's output",
    "in_rank": "rank of the input width within the host",
    "out_rank": "rank of the output width within the host",
    "in_degree": "number of layers that feed this one, squashed",
    "out_degree": "number of layers that this one feeds, squashed",
    "residual_degree": "number of residual edges that end here, squashed",
    "is_first": "1 where no layer feeds this one",
    "is_last": "1 where this one feeds no layer",
    "live_seeds": "seeds that live into this layer, squashed",
    "fossils": "seeds that became part of this layer, squashed",
    "adaptation_count": "adaptations applied at this layer, squashed",
    **_with_flags(
        {
            "in_to_upstream": "log ratio of input width to the mean input width of the layers that feed this one",
            "out_to_downstream": "log ratio of output width to the mean output width of the layers that this one feeds",
            "activated": "whether a non-linearity follows",
            "activation_mean": "mean output, squashed and signed; 1 at 100",
            "activation_variance": "variance of the output, squashed; 1 at 100",
            "dead_fraction": "share of dead units",
            "effective_rank": "effective rank of the output, relative to its units",
            "gradient_norm": "norm of the parameters' gradient, squashed from 1e-6; 1 at 1",
            "gradient_to_weight": "gradient norm relative to the parameters', squashed from 1e-6; 1 at 1",
            "vanishing_fraction": "share of vanishing gradient entries",
            "exploding_fraction": "share of exploding gradient entries",
            "expressivity_bottleneck": "share of the asked step that the layer cannot express",
            "latency_share": "share of the host's forward time that this layer takes",
            "latency_variation": "standard deviation of the layer's time, relative to its mean, squashed",
            "throughput_trend": "relative change of throughput per report, steepened",
            "log_memory": "bytes that the layer holds; 1 at a billion",
            "log_flops": "operations for one sample; 1 at a billion",
            "input_autocorrelation": "correlation of neighbouring input features",
            "effective_rank_rank": "rank of effective_rank within the host",
            "dead_fraction_rank": "rank of dead_fraction within the host",
            "gradient_norm_rank": "rank of gradient_norm within the host",
            "gradient_norm_to_host": "log ratio of gradient_norm to the host's mean",
            "expressivity_bottleneck_rank": "rank of expressivity_bottleneck within the host",
            "health": "overall health",
            "health_rank": "rank of health within the host",
            "health_trend": "slope of health per report, steepened",
            "stability": "how steady health has been",
            "readiness": "how ready the layer is to be adapted",
            "upstream_health": "mean health of the layers that feed this one",
            "downstream_health": "mean health of the layers that this one feeds",
            "layer_position": "relative depth",
            "steps_since_adaptation": "steps since the last adaptation here, squashed; 1 at 10,000",
            "last_effect": "measured effect of the last adaptation here, squashed and signed; 1 at 1",
        }
    ),
}
"""Features of a layer."""

PLACE_MEANINGS: Final[Mapping[str, str]] = {
    "span_two": "1 where the seed reads the input of another layer than it adds to",
    "log_source_width": "width of what the seed reads; 1 at 10,000",
    "log_target_width": "width of what the seed adds to; 1 at 10,000",
    "target_to_source_width": "log ratio of the two",
    "widening": "log ratio of the narrower end of a span of two to the narrowest width on the way; 0 for a span of one",
    "log_dense_size": "entries of a full linear map from source to target; 1 at 10^8",
    "spatial_source": "1 where the seed reads more than one dimension",
    "spatial_target": "1 where the seed adds to more than one dimension",
    "fitting": "share of those of the host's blueprints that the policy knows which fit here",
    "occupied": "1 where a seed lives here",
    "fossilised": "fossils here, squashed",
    "germinated": "seeds that were planted here so far, squashed",
    "culled": "seeds that were removed here so far, squashed",
    **_with_flags(
        {
            "growth_gradient": "gradient that a new linear graft would receive, squashed from 1e-8; 1 at 1",
            "growth_gradient_rank": "rank of growth_gradient within the host",
            "growth_gradient_to_best": "log ratio of growth_gradient to the host's greatest",
            "explained_error": "share of the back-propagated error that a linear graft could explain",
            "explained_error_rank": "rank of explained_error within the host",
            "explained_error_to_best": "log ratio of explained_error to the host's greatest",
            "affordable_rank": "rank of the linear map that the graft budget pays for, squashed; 1 at 100",
            "last_effect": "measured effect of the last adaptation at this place, squashed and signed; 1 at 1",
            "steps_since_adaptation": "steps since the last adaptation at this place, squashed; 1 at 10,000",
        }
    ),
}
"""Features of a place."""

GRAPH_MEANINGS: Final[Mapping[str, str]] = {
    "log_layers": "number of layers; 1 at 1,000",
    "log_places": "number of places; 1 at 1,000",
    "log_parameters": "parameters of all layers; 1 at a million",
    "log_step": "optimizer step; 1 at 100,000",
    "residual_share": "share of the edges that are residual",
    "branching": "greatest number of layers that one layer feeds, squashed",
    "narrowest_to_widest": "log ratio of the narrowest to the widest output, the last layer left out",
    "live_seeds": "seeds that live, squashed",
    "fossils": "fossils, squashed",
    "germinated": "seeds planted so far, squashed",
    "culled": "seeds removed so far, squashed",
    **_with_flags(
        {
            "train_loss": "training loss, squashed from 1e-3; 1 at 10",
            "held_out_loss": "held-out loss, squashed from 1e-3; 1 at 10",
            "loss_gap": "log ratio of held-out to training loss",
            "train_loss_slope": "slope of the logarithm of training loss per report, steepened",
            "held_out_loss_slope": "slope of the logarithm of held-out loss per report, steepened",
            "log_learning_rate": "learning rate, squashed from 1e-6; 1 at 1",
            "log_epoch": "epoch, squashed; 1 at 100",
            "mean_health": "mean health of the layers",
            "least_health": "health of the sickest layer",
            "mean_bottleneck": "mean expressivity_bottleneck of the layers",
            "best_explained_error": "greatest explained_error of the places",
            "best_growth_gradient": "greatest growth_gradient, squashed from 1e-8; 1 at 1",
            "seed_room": "seeds that may still be planted, squashed",
            "budget_left": "parameters that seeds may still have, relative to the host's, at most 1",
            "graft_budget": "parameters that one graft may have, relative to the host's, at most 1",
            "steps_to_last_germination": "steps until nothing more is germinated, squashed and signed; 1 at 10,000",
            "steps_since_adaptation": "steps since the last adaptation, squashed; 1 at 10,000",
        }
    ),
}
"""Features of the host as a whole."""

NODE_FEATURES: Final = tuple(NODE_MEANINGS)
PLACE_FEATURES: Final = tuple(PLACE_MEANINGS)
GRAPH_FEATURES: Final = tuple(GRAPH_MEANINGS)
