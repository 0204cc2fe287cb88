"""The reference: trl's objective written out, one backward pass a sequence, and dense formulas for the coefficients."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from isopo_mini.engine import NTK, FisherNormalized, layer_names

DECAY = 0.9


def scores(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """log π of the completions and the entropies, both `(S, T)`, by logits and in the model's precision."""
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=tokens, attention_mask=attention, use_cache=False).logits
    all_log_probs = (logits[:, :-1] / trainer.args.temperature).log_softmax(-1)
    log_probs = all_log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
    entropies = -(all_log_probs.exp() * all_log_probs).sum(-1)
    length = inputs["completion_ids"].shape[1]
    return log_probs[:, -length:], entropies[:, -length:]


def by_sequence(trainer: Any, losses: Tensor, mask: Tensor) -> Tensor:
    """Token losses `(S, T)` as one number a sequence: the mean for the loss type "grpo", the sum for all others."""
    sums = (losses * mask).sum(1)
    return sums / mask.sum(1) if trainer.args.loss_type == "grpo" else sums


def objectives(trainer: Any, inputs: dict[str, Any], log_probs: Tensor, advantages: Tensor) -> Tensor:
    """ℓ_s of every sequence, `(S,)`: the token losses of trl's documentation."""
    config = trainer.args
    mask, weights = inputs["completion_mask"].to(log_probs), advantages[:, None]
    old = inputs.get("old_per_token_logps")
    log_ratios = log_probs - (log_probs.detach() if old is None else old)
    if config.importance_sampling_level == "sequence":
        log_ratios = ((log_ratios * mask).sum(1) / mask.sum(1))[:, None].expand_as(log_probs)
    ratios = log_ratios.exp()
    if config.loss_type == "cispo":
        losses = -ratios.detach().clamp(max=config.epsilon_high) * weights * log_probs
    else:
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        losses = -torch.minimum(ratios * weights, ratios.clamp(1 - config.epsilon, 1 + high) * weights)
    return by_sequence(trainer, losses, mask)


def other_terms(trainer: Any, inputs: dict[str, Any], log_probs: Tensor, entropies: Tensor, accumulated: int) -> Tensor:
    """β times the k3 estimate of the KL times r, weighed as the policy's loss is, minus the entropy bonus."""
    config, mask = trainer.args, inputs["completion_mask"].to(log_probs)
    total = -config.entropy_coef * (entropies * mask).sum() / mask.sum() / accumulated
    if config.beta:
        differences = inputs["ref_per_token_logps"].to(log_probs) - log_probs
        old = inputs.get("old_per_token_logps", log_probs.detach())
        divergences = (differences.exp() - differences - 1) * (log_probs - old).exp()  # use_bias_correction_kl
        total = (
            total + config.beta * weight(trainer, inputs, accumulated) * by_sequence(trainer, divergences, mask).sum()
        )
    return total


def weight(trainer: Any, inputs: dict[str, Any], accumulated: int) -> float:
    """What trl divides the sum over sequences by."""
    config, sequences = trainer.args, len(inputs["advantages"])
    tokens_of_all = float(inputs["num_items_in_batch"]) * accumulated / config.steps_per_generation
    return {
        "grpo": 1 / (sequences * accumulated),
        "bnpo": 1 / (float(inputs["completion_mask"].sum()) * accumulated),
        "dr_grpo": 1 / (sequences * config.max_completion_length * accumulated),
        "dapo": trainer.accelerator.num_processes / tokens_of_all,
        "cispo": trainer.accelerator.num_processes / tokens_of_all,
    }[config.loss_type]


class Reference:
    """w Σ_s c_s ∇ℓ_s and ∇(KL and entropy) of every microbatch of a step, summed; with its own moving averages.

    Args:
        transform: whose published formula is written out in `coefficients`.
        signed: differentiate at sign A and weigh with |A|, which is right on and off policy; or at 1 and with A, which
            is what the loss is on policy. That both are the same there is what the integration relies on.
    """

    def __init__(self, transform: Any, signed: bool = True) -> None:
        self.transform = transform
        self.signed = signed
        self.history: dict[str, float] = {}

    def __call__(self, trainer: Any, microbatches: list[dict[str, Any]]) -> dict[str, Tensor]:
        parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
        layers = layer_names(trainer.model)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        pending: dict[str, list[float]] = {}
        for inputs in microbatches:
            advantages = inputs["advantages"].double()
            signs = torch.where(advantages < 0, -1.0, 1.0) if self.signed else torch.ones_like(advantages)
            given = advantages.abs() if self.signed else advantages
            log_probs, entropies = scores(trainer, inputs)
            gradients_of = partial(torch.autograd.grad, inputs=list(parameters.values()), retain_graph=True)
            terms = objectives(trainer, inputs, log_probs, signs.to(log_probs))
            rows = {
                name: torch.stack(parts) for name, *parts in zip(parameters, *map(gradients_of, terms), strict=True)
            }
            others = gradients_of(other_terms(trainer, inputs, log_probs, entropies, len(microbatches)))
            for name, gradient in zip(parameters, others, strict=True):
                total[name] += gradient
            scale = weight(trainer, inputs, len(microbatches))
            for layer in dict.fromkeys(layers.values()):
                own = [name for name, p in parameters.items() if layers[p] == layer]
                gradients = torch.cat([rows[name].flatten(1).double() for name in own], dim=1)  # (S, P)
                c = self.coefficients(layer, gradients @ gradients.T, given, pending)
                for name in own:
                    total[name] += scale * torch.tensordot(c.to(rows[name]), rows[name], 1)
        for layer, values in pending.items():
            self.history[layer] = self.average(layer, sum(values) / len(values))
        return total

    def coefficients(self, layer: str, gram: Tensor, advantages: Tensor, pending: dict[str, list[float]]) -> Tensor:
        eigenvalue = float(gram.trace()) / len(gram)
        pending.setdefault(layer, []).append(eigenvalue)
        mean = self.average(layer, eigenvalue)
        if isinstance(self.transform, NTK):
            damping = self.transform.damping * mean
            solved = torch.linalg.solve(gram + damping * torch.eye(len(gram)).double(), advantages)
            return damping * solved if self.transform.scale == "gradient" else solved
        assert isinstance(self.transform, FisherNormalized)
        norms = gram.square().mean(dim=1).sqrt()
        norms = norms.masked_fill(norms == 0, torch.inf)  # all tokens clipped: no gradient, and no share
        if self.transform.scale == "norm":
            return advantages / norms
        relative = advantages * gram.square().mean().sqrt() / norms
        return relative if self.transform.scale == "gradient" else relative / mean

    def average(self, layer: str, value: float) -> float:
        return DECAY * self.history[layer] + (1 - DECAY) * value if layer in self.history else value
