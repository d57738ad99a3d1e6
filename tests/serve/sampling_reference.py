"""What sampling should do, once more, in NumPy and one token at a time."""

import numpy as np


def shaped(logits, sampling, prompt, output, stop_ids=()):
    """Bias, penalties and min_tokens, as transformers' processors and OpenAI's API define them."""
    scores = np.asarray(logits, np.float64).copy()
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    for token in {*prompt, *output}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    for token in set(output):
        scores[token] -= sampling.frequency_penalty * output.count(token)
        scores[token] -= sampling.presence_penalty
    if len(output) < sampling.min_tokens:
        scores[list(stop_ids)] = -np.inf
    return scores


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def distribution(logits, sampling, prompt, output, stop_ids=()):
    """The probability of every token, filters one after another on a sorted row."""
    scores = shaped(logits, sampling, prompt, output, stop_ids) / sampling.temperature
    order = np.argsort(-scores)
    if sampling.top_k:
        scores[order[sampling.top_k :]] = -np.inf
    probs = softmax(scores)
    before = np.cumsum(probs[order]) - probs[order]
    scores[order[before >= sampling.top_p]] = -np.inf
    probs = softmax(scores)
    probs[probs < sampling.min_p * probs.max()] = 0
    return probs / probs.sum()
