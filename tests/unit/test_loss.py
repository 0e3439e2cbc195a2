"""The chunked loss against plain cross-entropy in fp64, and the precision of its sums."""

import pytest
import torch
import torch.nn.functional as F

from xtuner_hydra.loss import linear_cross_entropy


def example(rows=37, hidden=24, vocab=331, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(vocab, (rows,), generator=generator)


def reference(x, weight, labels):
    """(loss, gradient of x, gradient of weight) from the full logits in fp64."""
    x64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    loss = F.cross_entropy(x64 @ weight64.T, labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (x64, weight64))


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("chunk", [1, 64 * 37, 128 * 37, None])  # slices of 64, 64, 128 columns, all 331
def test_loss_and_gradients_are_those_of_the_full_logits(chunk):
    x, weight, labels = example()
    loss = linear_cross_entropy(x, weight, labels, chunk=chunk)
    (3.0 * loss).backward()
    expected, grad_x, grad_weight = reference(x, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert relative(x.grad, 3 * grad_x) < 1e-6
    assert relative(weight.grad, 3 * grad_weight) < 1e-6


def test_agrees_with_the_loss_of_torch():
    x, weight, labels = example()
    ours = torch.autograd.grad(linear_cross_entropy(x, weight, labels, chunk=5000), (x, weight))
    theirs = torch.autograd.grad(F.linear_cross_entropy(x, weight, labels, reduction="sum"), (x, weight))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_labels_at_the_edges_of_slices_count_once():
    x, weight, _ = example(rows=8)
    labels = torch.tensor([0, 63, 64, 127, 128, 319, 320, 330])
    loss = linear_cross_entropy(x, weight, labels, chunk=1)
    torch.testing.assert_close(loss.double(), reference(x, weight, labels)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows):
    x, weight, labels = example(rows=rows)
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    expected, grad_x, grad_weight = reference(x, weight, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=1e-5, atol=1e-6)


def test_logits_far_from_zero_neither_overflow_nor_vanish():
    x, weight, labels = example()
    with torch.no_grad():
        weight.mul_(300)
    loss = linear_cross_entropy(x, weight, labels, chunk=64 * 37)
    expected, grad_x, _ = reference(x, weight, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert relative(*torch.autograd.grad(loss, x), grad_x) < 1e-4


def test_the_sum_of_bf16_rows_is_not_rounded_to_bf16():
    x, weight, labels = example(rows=900, dtype=torch.bfloat16)
    with torch.no_grad():
        weight.mul_(0.05)
    loss = linear_cross_entropy(x, weight, labels, chunk=2**14)
    expected = reference(x, weight, labels)[0]
    assert loss.dtype == torch.float32
    assert abs(loss - expected) / expected < 1e-5
    assert abs(expected.bfloat16() - expected) / expected > 1e-4, "this sum would not show a bf16 result"


def test_the_head_gradient_is_summed_in_fp32():
    """4,096 rows that all push alike: a sum kept in bf16 stops growing where one row is less than half a unit in the last place."""
    rows, hidden, vocab = 4096, 16, 64
    x = torch.ones(rows, hidden, dtype=torch.bfloat16)
    weight = torch.zeros(vocab, hidden, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(rows) % 2
    linear_cross_entropy(x, weight, labels, chunk=64 * 64).backward()
    grad_weight = reference(x, weight, labels)[2]
    assert relative(weight.grad, grad_weight) < 2**-8

    one_row = (torch.full((vocab,), 1 / vocab) - F.one_hot(torch.tensor(2), vocab)).bfloat16()
    low = torch.zeros(vocab, dtype=torch.bfloat16)
    for _ in range(rows):
        low += one_row
    exact = rows * one_row.double()
    assert relative(low, exact) > 0.5, "a bf16 accumulator would pass"


def test_the_gradient_of_hidden_states_is_summed_over_slices_in_fp32():
    x, weight, labels = example(rows=4, hidden=16, vocab=64 * 600, dtype=torch.bfloat16)
    with torch.no_grad():
        x.zero_()
        weight.fill_(1.0)
        weight[labels] = 0.0
    linear_cross_entropy(x, weight, labels, chunk=1).backward()  # 600 slices, each adds 1/600 to every element
    assert relative(x.grad, reference(x, weight, labels)[1]) < 2**-8


def test_bf16_gradients_are_as_good_as_one_rounding_of_each_product_allows():
    x, weight, labels = example(rows=300, hidden=64, vocab=3000, dtype=torch.bfloat16)
    with torch.no_grad():
        weight.mul_(0.1)
    linear_cross_entropy(x, weight, labels, chunk=2**16).backward()
    _, grad_x, grad_weight = reference(x, weight, labels)
    assert relative(x.grad, grad_x) < 0.006
    assert relative(weight.grad, grad_weight) < 0.006


def test_evaluation_gives_the_same_number_without_a_graph():
    x, weight, labels = example()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(x, weight, labels).detach())


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_side_costs_no_gradient_and_leaves_the_other_as_it_was(frozen):
    x, weight, labels = example()
    _, grad_x, grad_weight = reference(x, weight, labels)
    (x if frozen == "hidden" else weight).requires_grad_(False)
    linear_cross_entropy(x, weight, labels).backward()
    still, moving, expected = (x, weight, grad_weight) if frozen == "hidden" else (weight, x, grad_x)
    assert still.grad is None
    assert relative(moving.grad, expected) < 1e-6


@pytest.mark.parametrize(
    ("x", "weight", "labels"),
    [
        (torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(1, 3, 4), torch.zeros(9, 4), torch.zeros(1, 3, dtype=torch.long)),
        (torch.zeros(3, 4), torch.zeros(9, 4, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long)),
    ],
)
def test_what_does_not_fit_together_is_refused(x, weight, labels):
    with pytest.raises(ValueError, match="disagree"):
        linear_cross_entropy(x, weight, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_change_no_bit(dtype):
    """None, half and all of the logits kept: the same loss and gradients, and a second backward pass still has them."""
    x, weight, labels = example(dtype=dtype)
    every = x.itemsize * len(x) * len(weight)
    losses, gradients = [], []
    for kept in (0, every // 2, every):
        losses.append(linear_cross_entropy(x, weight, labels, chunk=64 * 37, kept=kept))
        gradients.append(torch.autograd.grad(losses[-1], (x, weight), retain_graph=True))
        gradients.append(torch.autograd.grad(losses[-1], (x, weight)))
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    for of_x, of_weight in gradients:
        assert torch.equal(of_x, gradients[0][0])
        assert torch.equal(of_weight, gradients[0][1])


class Made(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that was made, and how many matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket is torch.ops.aten.mm
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_memory_does_not_hold_the_logits():
    """Of 2,048 x 8,192 logits (64 MiB in fp32) no tensor larger than `chunk` of them is ever made."""
    x, weight, labels = example(rows=2048, hidden=8, vocab=8192)
    with Made() as made:
        linear_cross_entropy(x, weight, labels, chunk=2**18).backward()
    assert made.largest <= 2**18


@pytest.mark.parametrize(("kept", "slices"), [(0, 0), (2**20, 1), (5 * 2**20 + 1, 5), (2**30, 64)])
def test_no_more_logits_are_kept_than_there_is_room_for(kept, slices):
    """64 slices of 2,048 x 128 logits, 1 MiB each; what is kept is not computed a second time."""
    x, weight, labels = example(rows=2048, hidden=8, vocab=8192)
    with Made() as made:
        loss = linear_cross_entropy(x, weight, labels, chunk=2**18, kept=kept)
        held = loss.grad_fn.kept
        assert sum(logits.nbytes for logits in held.values()) == slices * 2**20
        loss.backward()
    assert made.products == 4 * 64 - slices
    assert not held
