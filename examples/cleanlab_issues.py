"""cleanlab finds, neighbours correct: digits with 20 % wrong labels, and the issue table back."""

import numpy as np
from cleanlab.classification import CleanLearning
from cleanlab.filter import find_label_issues
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from als_ext import correct_labels
from als_ext.data import apply_noise
from als_ext.integrations.cleanlab import label_issues, suspects

x, true = load_digits(return_X_y=True)
x = x.astype(np.float32) / 16
given = apply_noise(true, "symmetric:0.2", num_classes=10, seed=0).labels.numpy()
print(f"labels right: {(given == true).mean():.3f}")

# In: what cleanlab found may be relabelled, the others vote.
model = LogisticRegression(max_iter=200)
probability = cross_val_predict(model, x, given, method="predict_proba", cv=3)
found = find_label_issues(given, probability, n_jobs=1)
result = correct_labels(x, given, suspects=suspects(found), metric="l2")
by_cleanlab = (result.new_label == true).mean()
print(f"suspects of cleanlab, corrected by neighbours: {by_cleanlab:.3f}")

# Out: our own suspects as cleanlab's table, here for its CleanLearning to leave out.
result = correct_labels(x, given, metric="l2")
table = label_issues(result)
own = (result.new_label == true).mean()
print(f"own suspects: {own:.3f}", table.sort_values("label_score").head(), sep="\n")
learner = CleanLearning(model, verbose=False)
learner.fit(x, given, label_issues=table.rename(columns={"label_score": "label_quality"}))
assert min(by_cleanlab, own) > 0.9
