"""A request counts its tokens; an update knows whether it is the last."""

from specbackend.request import FinishReason, Request, Update


def test_requests_of_equal_content_are_different_requests():
    assert Request("a", [1]) != Request("a", [1])


def test_request_counts_prompt_and_output():
    request = Request("a", [1, 2], output_ids=[3])
    assert (request.num_tokens, request.all_ids) == (3, [1, 2, 3])


def test_text_array_follows_the_output():
    request = Request("a", [1, 2])
    assert list(request.text_array()) == [1, 2]
    for more in ([3], [], [4, 5]):
        request.output_ids += more
        assert list(request.text_array()) == request.all_ids
    assert list(Request("b", [1, 2], output_ids=[3]).text_array()) == [1, 2, 3]


def test_update_is_finished_when_it_says_why():
    assert not Update("a", [1]).finished
    assert Update("a", [1], FinishReason.STOP).finished
