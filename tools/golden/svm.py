#!/usr/bin/env python3
"""Makes crates/train/tests/golden/svm.safetensors: linear support vector machines of scikit-learn (LIBLINEAR).

Features, labels, and for each loss and C the weights, intercepts and decisions of LinearSVC, one
against all, by the dual with a tight tolerance. Needs scikit-learn, numpy and safetensors:

    python3 tools/golden/svm.py
"""

import hashlib
import pathlib
import warnings

import numpy as np
import sklearn
from safetensors.numpy import save_file
from sklearn.svm import LinearSVC

HERE = pathlib.Path(__file__).resolve()
TARGET = HERE.parents[2] / "crates/train/tests/golden/svm.safetensors"

ROWS, DIM, CLASSES = 80, 12, 4


def main():
    # What does not converge is no reference. (With 1e-12 it does not: the steps end at that size.)
    warnings.simplefilter("error")
    random = np.random.default_rng(20180618)
    labels = random.integers(0, CLASSES, ROWS)
    # Classes that overlap, along directions of different lengths, normalised as representations are.
    centres = random.normal(size=(CLASSES, DIM))
    features = centres[labels] + 1.2 * random.normal(size=(ROWS, DIM)) * np.linspace(0.3, 2.0, DIM)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    tensors = {"features": features, "labels": labels.astype(np.int64)}
    for loss in ("hinge", "squared_hinge"):
        for c in (1.0, 0.1):
            svm = LinearSVC(C=c, loss=loss, dual=True, tol=1e-9, max_iter=10_000_000, random_state=1)
            svm.fit(features.astype(np.float64), labels)
            name = f"{loss}.{c:g}"
            tensors[f"{name}.weights"] = svm.coef_
            tensors[f"{name}.intercepts"] = svm.intercept_
            tensors[f"{name}.decisions"] = svm.decision_function(features.astype(np.float64))

    TARGET.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(HERE.read_bytes()).hexdigest()
    # One entry alone: safetensors writes several in any order, and the file must be the same bytes.
    metadata = {"generator": f"tools/golden/svm.py, sha256 {digest}, scikit-learn {sklearn.__version__}"}
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, TARGET, metadata=metadata)
    print(f"wrote {TARGET} ({TARGET.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
