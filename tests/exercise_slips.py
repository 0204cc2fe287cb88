"""What may happen to the book's own solutions in a reader's hands: one thing in their text is replaced."""

# (what is replaced, which stands there once; by what; how the hint begins, empty where none must follow)
SLIPS: dict[str, list[tuple[str, str, str]]] = {
    "reinforce_loss": [
        ("log_probs * mask", "log_probs", "The mask is missing"),
        (
            "-(advantages * sequence_log_probs).mean()",
            "-(advantages * log_probs * mask).sum() / len(mask)",
            "log_probs *",
        ),
        (".mean()", ".sum()", "This is the sum over sequences"),
    ],
    "fisher_product": [
        ("(v - pi @ v)", "v", "This is diag(π) v."),
        ("pi @ v", "v.mean()", "The plain mean of v"),
    ],
    "weighted_dual": [
        ("weights.sqrt()", "weights", "The weights stand in the rows where"),
        ("root * A", "A", "The rows carry √w, but"),
    ],
    "gspo_objective": [
        ("((log_pi - log_old) * mask)", "(log_pi - log_old)", ""),  # a mixture that no hint is about
        (" / mask.sum(1)", "", "s is the ratio of the whole sequences"),
        ("torch.minimum(s * A, s.clamp(1 - eps, 1 + eps) * A)", "s.clamp(1 - eps, 1 + eps) * A", "The minimum with"),
    ],
    "published_step": [
        ("lengths.norm() / ", "1 / ", "The denominator of (6) is missing"),
        (" / len(c)", "", "This is the sum over sequences"),
        ("-torch.einsum", "torch.einsum", "The sign"),
    ],
    "shared_coefficients": [
        ("gram * counts", "gram * counts[:, None]", "These are the coefficients of the transpose"),
        ("gram * counts", "gram", "These are the coefficients when each"),
        ("damping * torch.linalg", "torch.linalg", "The factor λ is missing"),
    ],
    "isopo_by_hand": [
        ("rho * K.trace() / len(K)", "rho", "λ is ρ itself"),
        ("rho * K.trace() / len(K)", "rho * K.mean()", "λ is made of the mean of all entries"),
        ("rho * K.trace() / len(K)", "rho * K.trace()", "λ is ρ tr K:"),
        ("c = damping * ", "c = ", "The factor λ is missing in c"),
        (" - pi", " - pi\n    g2 = advantages[:, None, None] * g2", "The advantages are in the loss and in c"),
        ('"s,soi->oi", c', '"s,soi->oi", advantages', "This is REINFORCE"),
        ('"s,soi->oi", c', '"s,soi->oi", c / len(c)', "This is the mean over sequences"),
    ],
    "orthogonalise": [
        ("range(40)", "range(1)", "This is one iteration"),
        ("range(40)", "range(0)", "This is M over its norm"),
    ],
    "cosine_in_logits": [
        ("v - (pi * v).sum(-1, keepdim=True)", "v", "Nothing is centred"),
        ("v - (pi * v).sum(-1, keepdim=True)", "v - v.mean(-1, keepdim=True)", "The mean over arms is a plain one"),
        ("d * pi * centred(v)", "pi * centred(v)", "All contexts count alike"),
    ],
    "to_come": [
        ("last_value if truncated else 0.0", "last_value", "The value of the last state is added although"),
        ("last_value if truncated else 0.0", "0.0", "A truncated episode would have gone on"),
        ("if truncated", "if not truncated", "The two ends are exchanged"),
    ],
    "response_log_probs": [
        (".masked_fill(~mask, 0.0)", "", "The prompt counts too"),
        ("-losses", "losses", "These are the losses"),
        (".sum(dim=1)", ".sum(dim=1) / mask.sum(1)", "This is the mean over the response"),
    ],
    "chosen": [
        ("filled = [0 if score != score else score for", "filled = [score for", ""),  # nan is below nothing
        (", size\n", ", -size\n", "Of two equal means the larger"),
        (
            "[0 if score != score else score for score in tried[size]]",
            "[s for s in tried[size] if s == s]",
            "Runs that",
        ),
    ],
    "predict": [
        ("(eta * gap)", "gap", "The step size η is missing"),
        ("k + math", "math", "This counts from"),
        ("math.log(", "math.log10(", "The logarithm is to base 10"),
    ],
    "swapped_limit": [
        (" - limit(0.0)", "", "The others count 1/β more, as they must."),
        ("later / beta", "later", "The first reward is missed, as it must be."),
        ("later / beta", "limit(beta)", "This is the right program's limit"),
    ],
    "descent": [
        ("[-0.35 * second, -1.0, good, good]", "[1.0, 0.0, 0.0, 0.0]", "A bandit on which the step is right"),
        ("[1 - eps, second, rare, rare]", "[1 - eps, second, rare, 0.0]", "Every arm needs a positive probability"),
        ("[1 - eps, second, rare, rare]", "[1 - eps, second, rare]", "Give four probabilities"),
    ],
    "cosh_step": [
        ("torch.arcsinh(torch.sinh(theta) - lam * u)", "torch.sinh(theta) - lam * u", "This is the step in the mirror"),
        ("- lam", "+ lam", "This step goes along u"),
        ("torch.arcsinh(torch.sinh(theta) - lam * u)", "theta - lam * u", "This is the gradient step"),
    ],
    "best_baseline": [
        ("p * (scores**2)", "(scores**2)", "The rewards are weighted by squared lengths"),
        (" / square.sum()", "", "The weights are not divided"),
        ("(scores**2).sum(1)", "1", "This is the mean reward"),
    ],
    "policy_iteration": [
        ("s.R + ", "", "The cost of the control"),
        ("@ P @ s.A", "@ P @ (s.A - s.B @ K)", "The new gain is greedy from A"),
        ("s.value_matrix(K)", "s.Q", "This is greedy for the next cost alone"),
    ],
    "modulus": [
        ("return sigma - 1 + np.sqrt(sigma**2 - sigma)", "return np.sqrt(sigma - 1)", "This holds for complex roots"),
        ("- 1 + np", "- 1 - np", "For σ > 1 this is the smaller"),
        ("np.sqrt(1 - sigma)", "1 - sigma", "For σ < 1 this is the real part"),
    ],
    "packed_gradients": [
        ("y[mask].T @ x[mask]", "x[mask].T @ y[mask]", "Each gradient is transposed"),
        ("y[mask].T @ x[mask]", "y.T @ x", "Every sequence gets"),
        ("segments == s", "segments.sort().values == s", "The positions of a sequence are taken"),
    ],
    "rank_step": [
        ("c[first : first + sizes[rank]]", "c[: sizes[rank]]", "The coefficients are those that stand first"),
        ("len(sizes) * ", "", "DDP takes the mean over the ranks"),
        ('->oi", own', '->oi", advantages[first : first + sizes[rank]]', "The advantages weigh"),
    ],
    "projected_off": [
        ("v - basis.T", "basis.T", "This is the part in the span"),
        ("basis = directions[values > 1e-10 * values[0]]", "basis = G / G.norm(dim=1)[:, None]", "The rows are taken"),
    ],
    "dual_is_right": [
        ("0.1", "1e-9", "One broken program passes: with a tiny damping"),
        (
            "torch.allclose(solve(S, A, damping), expected)",
            "torch.cosine_similarity(solve(S, A, damping), expected, dim=0).item() > 1 - 1e-6",
            "One broken program passes: it is N times too long",
        ),
        ("torch.allclose(solve(S, A, damping), expected)", "bool(solve(S, A, damping).isfinite().all())", "Nothing is"),
    ],
    "coefficients_are_right": [
        ("G @ G.T", "torch.ones(6, 6)", "The mean of all entries passes"),
        ("G @ G.T", "torch.eye(6)", "The largest eigenvalue passes"),
        ("0.5", "1e9", "Nothing is refused"),
    ],
    "advantages_are_right": [
        (
            "torch.allclose(advantages_of(rewards, 4), torch.cat(rows), atol=1e-6)",
            "advantages_of(rewards, 4).view(3, 4).mean(1).abs().max().item() < 1e-6",
            "The program that does not divide passes",
        ),
        (
            "torch.allclose(advantages_of(rewards, 4), torch.cat(rows), atol=1e-6)",
            "advantages_of(rewards, 4).mean().abs().item() < 1e-6",
            "Nothing is refused",
        ),
    ],
    "cost_is_right": [
        ("[[0.1, 0.2]]", "[[0.0, 0.0]]", "Nothing is refused"),
        ("range(300)", "range(2)", "Everything is refused"),
    ],
    "gram_is_right": [
        ("[one, one]", "[torch.cat([one, one])]", "Nothing is refused"),
        ("torch.allclose(K, K[0, 0].expand(2, 2))", "torch.allclose(K[0, 0], K[1, 1])", "The program without products"),
        ("torch.allclose(K, K[0, 0].expand(2, 2))", "bool((K != 0).all())", "The program whose ranks draw apart"),
        ("K[0, 0]", "one.square().sum().double()", "Everything is refused"),
    ],
}
