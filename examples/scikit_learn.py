"""scikit-learn on digits with 40 % wrong labels: a network that corrects, and any classifier."""

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from als_ext.data import apply_noise
from als_ext.integrations.sklearn import AlsClassifier, CorrectedClassifier

torch.set_num_threads(1)  # steps this small only wait for a second thread
x, y = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(x, y, random_state=0, stratify=y)
noisy = apply_noise(y_train, "symmetric:0.4", num_classes=10, seed=0).labels.numpy()
print(f"labels right: {(noisy == y_train).mean():.3f}")

classifiers = {
    "LogisticRegression": LogisticRegression(max_iter=1000),
    "the same, on corrected labels": CorrectedClassifier(LogisticRegression(max_iter=1000)),
    "AlsClassifier": AlsClassifier(random_state=0),
}
accuracy = {}
for name, classifier in classifiers.items():
    model = make_pipeline(MinMaxScaler(), classifier).fit(x_train, noisy)
    accuracy[name] = model.score(x_test, y_test)
    print(f"{name}: test accuracy {accuracy[name]:.3f}")
plain, corrected, network = accuracy.values()
assert min(corrected, network) > plain + 0.03
