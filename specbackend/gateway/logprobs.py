"""Log-probabilities, from llm's JSON to the forms of OpenAI.

For each place llm has {id: {"logprob", "rank", "decoded_token"}}: the token that was picked comes first, and a rank
above the number of alternatives that were asked for says that it is not one of them.
"""

from typing import Any

Place = dict[str, dict[str, Any]]
UNDECODED = "\N{REPLACEMENT CHARACTER}"  # of a token that is a part of a character


def picked(place: Place) -> tuple[int, dict[str, Any]]:
    token, entry = next(iter(place.items()))
    return int(token), entry


def likeliest(place: Place, count: int) -> list[tuple[int, dict[str, Any]]]:
    ranked = sorted(place.items(), key=lambda item: item[1]["rank"])
    return [(int(token), entry) for token, entry in ranked if entry["rank"] <= count][:count]


def of_chat(places: list[Place], top: int) -> dict[str, Any]:
    """A chat's logprobs."""
    content = [
        {**_token(picked(place)[1]), "top_logprobs": [_token(entry) for _, entry in likeliest(place, top)]}
        for place in places
    ]
    return {"content": content, "refusal": None}


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    text = entry["decoded_token"]
    return {
        "token": text,
        "logprob": entry["logprob"],
        "bytes": None if UNDECODED in text else list(text.encode()),
    }


class CompletionLogprobs:
    """The four lists of a completion's logprobs. Offsets are in the text so far, so it grows with the answer."""

    def __init__(self, top: int):
        self._top = top
        self._offset = 0

    def add(self, places: list[Place | None], texts: list[str | None]) -> dict[str, list]:
        """texts: of places that are None, where nothing comes before."""
        lists: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for place, alone in zip(places, texts, strict=True):
            entry = picked(place)[1] if place else {"decoded_token": alone, "logprob": None}
            lists["tokens"].append(entry["decoded_token"])
            lists["token_logprobs"].append(entry["logprob"])
            lists["top_logprobs"].append(self._by_text(place) if place else None)
            lists["text_offset"].append(self._offset)
            self._offset += len(entry["decoded_token"])
        return lists

    def _by_text(self, place: Place) -> dict[str, float]:
        """The likeliest and the one that was picked. Of tokens that look alike only the likeliest is told."""
        logprobs: dict[str, float] = {}
        for _, entry in (*likeliest(place, self._top), picked(place)):
            logprobs.setdefault(entry["decoded_token"], entry["logprob"])
        return logprobs
