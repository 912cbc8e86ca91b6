"""The rare word of a run's prompts, which CLIP was never taught: which one it is, and which ones it cannot be."""

from __future__ import annotations

from ether_diffusion.metrics.fidelity import check_token, without_token
from ether_diffusion.runs.record import Run


def rare_token(run: Run) -> str | None:
    """The run's new token, or the one word that the instance prompt has and the class prompt has not.

    None if it is ambiguous: a prompt is not recorded, there is no such word or more than one, or the run's samples
    have it nowhere or in other letters (``Qwe``), too.
    """
    rare = _rare_words(run)
    if len(rare) != 1 or not any(rare[0] in _words(prompt["prompt"]) for prompt in run.prompts):
        return None
    return None if words_kept(run, rare[0]) else rare[0]


def checked_token(run: Run, token: str | None) -> str | None:
    """The token, if it can be the rare word of the run's prompts; where none is given, :func:`rare_token`.

    Raises:
        ValueError: it is empty, no prompt has it, it has a word of the class prompt, or it lacks the run's rare word.
    """
    own = rare_token(run)
    if token is None:
        return own
    hint = f"give {own!r}" if own else "give the rare word of the training alone"
    if not token.strip():
        raise ValueError(f"the token is empty: {hint}, or leave it out")
    known = {word.casefold() for word in _words(run.class_prompt or "")}
    for word in _words(token):
        if word.casefold() in known:
            raise ValueError(
                f"the token {token!r} has {word!r}, a word of the class prompt {run.class_prompt!r}, "
                f"which CLIP-T needs: {hint}"
            )
    check_token(token, [prompt["prompt"] for prompt in run.prompts])
    if own and own not in _words(token):
        raise ValueError(
            f"the token {token!r} is not the rare word of this run, which its instance prompt "
            f"{run.instance_prompt!r} has and its class prompt {run.class_prompt!r} has not: {hint}, or leave it out"
        )
    return token


def _rare_words(run: Run) -> list[str]:
    """The words that the instance prompt has and the class prompt has not; none if one of the two is not recorded.

    Of a run with a new token that token alone.
    """
    if run.placeholder_token is not None:
        return [run.placeholder_token]
    if not run.instance_prompt or not run.class_prompt:
        return []
    known = {word.casefold() for word in _words(run.class_prompt)}
    return list(dict.fromkeys(word for word in _words(run.instance_prompt) if word.casefold() not in known))


def words_kept(run: Run, token: str) -> list[str]:
    """The rare words, in any letters, that the run's prompts still have without the token."""
    rare = {word.casefold() for word in (*_rare_words(run), *_words(token))}
    left = [word for prompt in run.prompts for word in _words(without_token(prompt["prompt"], token))]
    return list(dict.fromkeys(word for word in left if word.casefold() in rare))


def _words(text: str) -> list[str]:
    """What stands between spaces, without the punctuation around it."""
    return [word for part in text.split() if (word := part.strip(".,;:!?\"'()"))]
