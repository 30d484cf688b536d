"""The contract in plain float64, written without the package: the measure of every result.

A layer is a dict of the arguments of TranscoderWeights, so that nothing the package stores can
change the answer.
"""

import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCREENINGS = ("auto", "off", "int16", "int8")  # every value of the option


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape, low=-2, high=3, seed=0):
    """Small whole numbers: sums of products are exact in float32, and results compare by bits."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def make_layer(features, hidden_size, seed=0, kind="relu", dtype=torch.float32, **fields):
    """A layer whose pre-activations are near N(0, 1) for unit normal hidden states."""
    layer = {
        "W_enc": (normal(features, hidden_size, seed=seed + 1) / math.sqrt(hidden_size)).to(dtype),
        "b_enc": (0.1 * normal(features, seed=seed + 2)).to(dtype),
    }
    if kind == "jumprelu":
        layer["threshold"] = normal(features, seed=seed + 3).abs().to(dtype)
    if kind == "topk":
        layer["k"] = max(1, features // 4)
    return {**layer, **fields}


def on(layer, device):
    return {
        name: value.to(device) if torch.is_tensor(value) else value for name, value in layer.items()
    }


def wide(tensor):
    return tensor.detach().cpu().double()


def rows(hidden, layer):
    """[N, H] float64: what the encoder matrix sees."""
    x = wide(hidden).reshape(-1, hidden.shape[-1])
    if layer.get("input_bias") is not None:
        x = x - wide(layer["input_bias"])
    if layer.get("ln_weight") is not None:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x * wide(layer["ln_weight"]) + wide(layer["ln_bias"])
    return x


def pre_activations(hidden, layer):
    return rows(hidden, layer) @ wide(layer["W_enc"]).T + wide(layer["b_enc"])


def broken_rows(hidden):
    return ~hidden.detach().cpu().isfinite().all(-1).reshape(-1)


def expected(hidden, layer, top_k, tau):
    """(activations, indices, sparsity) of the contract, from exact values rounded to float32."""
    pre = pre_activations(hidden, layer).float()
    features = pre.shape[1]
    k = min(top_k, features)
    kept = (pre > 0) & (pre >= torch.tensor(tau, dtype=torch.float32))
    if layer.get("threshold") is not None:
        kept &= pre > wide(layer["threshold"]).float()
    if layer.get("k") is not None:
        order = pre.sort(stable=True, dim=-1, descending=True).indices[:, : layer["k"]]
        kept &= torch.zeros_like(kept).scatter(1, order, True)
    masked = torch.where(kept, pre, 0.0)
    values, ids = masked.sort(stable=True, dim=-1, descending=True)
    values, ids = values[:, :k].clone(), ids[:, :k].clone()
    sparsity = (kept.sum(-1).double() / features).float()
    broken = broken_rows(hidden)
    values[broken], sparsity[broken], ids[broken] = math.nan, math.nan, torch.arange(k)
    lead = hidden.shape[:-1]
    return values.reshape(*lead, k), ids.reshape(*lead, k), sparsity.reshape(lead)


def tolerances(hidden, layer, pre, unit):
    if unit:
        return 1e-5 * pre.abs().clamp(min=1)
    terms = rows(hidden, layer).abs() @ wide(layer["W_enc"]).abs().T + wide(layer["b_enc"]).abs()
    return 1e-5 * terms + 1.5e-45 * (hidden.shape[-1] + 1)  # A denormal step for each rounding.


def gates(pre, tolerance, layer, tau):
    """Which features are surely kept, and which possibly, if each value errs by its tolerance."""
    low, high = pre - tolerance, pre + tolerance
    tau = torch.tensor(tau, dtype=torch.float32).double()
    surely, possibly = (low > 0) & (low >= tau), (high > 0) & (high >= tau)
    if layer.get("threshold") is not None:
        surely &= low > wide(layer["threshold"])
        possibly &= high > wide(layer["threshold"])
    if layer.get("k") is not None:
        features = pre.shape[1]
        not_below = features - torch.searchsorted(high.sort(-1).values, low.contiguous())
        above = features - torch.searchsorted(low.sort(-1).values, high.contiguous(), right=True)
        surely &= not_below <= layer["k"]
        possibly &= above < layer["k"]
    return surely, possibly


def check(result, hidden, layer, top_k, tau, unit=True):
    """Assert all that the contract says of one result.

    Its form, order, fillers, values, gates, completeness and counts.
    """
    values, ids, sparsity = (result[name] for name in ("activations", "indices", "sparsity"))
    features = layer["W_enc"].shape[0]
    k = min(top_k, features)
    lead = tuple(hidden.shape[:-1])
    assert (values.dtype, ids.dtype, sparsity.dtype) == (torch.float32, torch.int64, torch.float32)
    assert (tuple(values.shape), tuple(ids.shape), tuple(sparsity.shape)) == (
        (*lead, k),
        (*lead, k),
        lead,
    )
    assert values.device == ids.device == sparsity.device == hidden.device
    assert not values.requires_grad and not sparsity.requires_grad
    values, ids, sparsity = (
        values.cpu().reshape(-1, k),
        ids.cpu().reshape(-1, k),
        sparsity.cpu().reshape(-1),
    )
    if not values.shape[0]:
        return

    broken = broken_rows(hidden)
    assert values[broken].isnan().all() and sparsity[broken].isnan().all()
    assert (ids[broken] == torch.arange(k)).all()
    sound = ~broken
    values, ids, sparsity = values[sound], ids[sound], sparsity[sound]
    hidden = hidden.detach().cpu().reshape(-1, hidden.shape[-1])[sound]
    pre = pre_activations(hidden, layer)
    tolerance = tolerances(hidden, layer, pre, unit)
    surely, possibly = gates(pre, tolerance, layer, tau)

    assert not values.isnan().any() and not values.signbit().any(), "negative, -0.0 or NaN"
    assert ((ids >= 0) & (ids < features)).all(), "index out of range"
    ordered = ids.sort(-1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all(), "an index twice in one row"
    left, right = values[:, :-1], values[:, 1:]
    assert ((left > right) | ((left == right) & (ids[:, :-1] < ids[:, 1:]))).all(), (
        "not descending, or ties not by id"
    )

    positive = values > 0
    taken = torch.zeros(pre.shape, dtype=torch.bool).scatter(1, ids, positive)
    rank_of_unkept = (~taken).cumsum(1).gather(1, ids)
    fillers = (~positive).sum(1, keepdim=True)
    assert (positive | (rank_of_unkept <= fillers)).all(), (
        "fillers are not the lowest ids that are not kept"
    )

    wrong = positive & ((values.double() - pre.gather(1, ids)).abs() > tolerance.gather(1, ids))
    assert not wrong.any(), f"{int(wrong.sum())} values are off"
    assert (possibly.gather(1, ids) | ~positive).all(), "a feature below its gate is returned"
    missed = surely & ~taken & (pre - tolerance > values[:, -1:].double())
    assert not missed.any(), (
        f"{int(missed.sum())} features are missing, "
        f"first at [row, id] {missed.nonzero()[0].tolist()}"
    )

    count = (sparsity.double() * features).round()
    assert torch.equal(sparsity, (count / features).float()), "sparsity is not a count divided by F"
    assert (surely.sum(1) <= count).all() and (count <= possibly.sum(1)).all(), (
        "wrong count of active features"
    )
    assert torch.equal(positive.sum(1).double(), count.clamp(max=k)), (
        "activations and count disagree"
    )


def same_bits(got, want):
    """Equal bit for bit; NaN equals NaN."""
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same_bits(got[name], want[name]) for name in want)
    if not torch.is_tensor(want):
        return got == want
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if got.is_floating_point():
        nan = want.isnan()
        return torch.equal(got.isnan(), nan) and torch.equal(
            got.masked_fill(nan, 0).contiguous().view(torch.int32),
            want.masked_fill(nan, 0).contiguous().view(torch.int32),
        )
    return torch.equal(got, want)
