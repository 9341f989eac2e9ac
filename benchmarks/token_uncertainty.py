"""What a KLA language model says of its own error, token by token, beside the loss of that token."""

import torch


@torch.no_grad()
def token_columns(model, ids, samples):
    """Of token ids (B, T), flat float32 columns of the B (T - 1) tokens that have a target."""
    out = model(ids, marginal_samples=samples, output_uncertainty=True, use_cache=False)
    logs = torch.log_softmax(model(ids, use_cache=False).logits.float(), -1)
    target = ids[:, 1:, None]
    columns = {
        "loss": -out.logits[:, :-1].gather(-1, target),
        "plain_loss": -logs[:, :-1].gather(-1, target),
        "marginal_entropy": out.predictive_entropy[:, :-1],
        "plain_entropy": -(logs.exp() * logs).sum(-1)[:, :-1],
        "log_variance": out.uncertainties[-1].mean(-1)[:, :-1].log(),
    }
    return {name: column.flatten().float() for name, column in columns.items()}


def joined(pieces):
    """One dictionary of columns out of those of several batches."""
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def correlation(columns, name, loss="loss"):
    return round(torch.corrcoef(torch.stack([columns[name], columns[loss]]))[0, 1].item(), 4)


def by_entropy(columns, count):
    """(mean marginal entropy, mean loss) of `count` equally large groups of tokens, sorted by entropy."""
    entropy, loss = columns["marginal_entropy"], columns["loss"]
    edges = torch.quantile(entropy, torch.linspace(0, 1, count + 1, device=entropy.device)[1:-1])
    bins = torch.bucketize(entropy, edges)
    return [[round(column[bins == b].mean().item(), 4) for column in (entropy, loss)] for b in range(count)]
