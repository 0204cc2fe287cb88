"""ISOPO inside the training programs of others. Each module is thin and optional; importing this room loads none.

- `torchrun`: a batch shared out to several processes, with one Gram matrix for all.
- `trl`: `IsopoGRPOTrainer`, trl's `GRPOTrainer` with ISOPO's gradient (extra `trl`); `lm_head` is a part of it.

A loop of your own needs no module, with `accelerate` or without. Two things have to be known of `accelerate`: the
engine and its hook are given the model and the optimizer before `prepare` wraps them, and `accelerator.backward`
divides the loss by the number of microbatches, which is a scale of the loss that the engine must be told:

    isopo = Isopo(model, NTK(damping=1.0))
    optimizer.register_step_post_hook(lambda *_: isopo.end_step())
    model, optimizer = accelerator.prepare(model, optimizer)
    for sequences, advantages in batches:
        with accelerator.accumulate(model):
            with isopo.microbatch(advantages, loss_scale=1 / accelerator.gradient_accumulation_steps):
                accelerator.backward(-log_prob(model, sequences).sum())
            optimizer.step()
            optimizer.zero_grad()
"""
