"""Where a VM's pages are, page by page, asked of its pager in parts that no refault waits for long."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from hva_host.agent.pager_process import PagerHandle
from hva_host.pager.messages import RESIDENCE_PAGES_MAX
from hvaqemu.errors import ProtocolError
from hvaqemu.pages import Run


def parts(pages: int) -> Iterator[Run]:
    """A guest's RAM of ``pages`` pages in parts that can be asked for."""
    for start in range(0, pages, RESIDENCE_PAGES_MAX):
        yield Run(start, min(RESIDENCE_PAGES_MAX, pages - start))


async def compressed_part(pager: PagerHandle, part: Run) -> bytes:
    """The map of a part as it goes over wires: a byte a page (:class:`~hvaqemu.pages.Residence`), compressed.

    :raise ProtocolError: what the pager answered is no map.
    :raise HvaError: the pager went or was silent.
    """
    answer = await pager.link.call("residence", {"start": part.start, "pages": part.pages})
    try:
        return base64.b64decode(answer["map"], validate=True)
    except (binascii.Error, KeyError, TypeError) as error:
        raise ProtocolError("the pager's map is none") from error
