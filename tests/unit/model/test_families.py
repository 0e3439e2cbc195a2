"""Every family against transformers on small random checkpoints: the numbers, the files, and that a fault would be seen."""

import pytest
import torch
from parity import CASES, LENGTH, document, make_checkpoint, ours, pack, reference_gradients, same_logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """case -> its directory, made once."""
    made = {}

    def directory(case):
        if case not in made:
            made[case] = make_checkpoint(tmp_path_factory.mktemp(case.replace(" ", "_")), case)
        return made[case]

    return directory


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(checkpoint, case):
    same_logits(checkpoint(case), ours(checkpoint(case)))


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_give_the_logits_and_gradients_of_separate_ones(checkpoint, case):
    documents = [document(length, length) for length in (LENGTH, 1, 40, 2)]
    targets = document(sum(map(len, documents)), 9)
    logits, gradients = reference_gradients(checkpoint(case), documents, targets)
    model = ours(checkpoint(case))
    torch.testing.assert_close(model(*pack(documents)), logits, rtol=0, atol=1e-4)
    model(*pack(documents), rows=torch.arange(len(targets)), targets=targets).backward()
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() < 1e-3 * gradients[name].norm(), name
