"""A run as one HTML page that opens from disk: one file that fetches nothing.

    with build(open_run("out")) as page:
        page.write("out.html")

Theory of operation. Records stream through once. Each becomes a row of the summary (for list,
filters and plots) and a few lines of JSON in a block. Blocks of neighbouring records are deflated
together and stand in the page as base64; the browser inflates a block when one of its records is
opened. So the page is about as large as the compressed run, and memory stays flat: blocks wait in a
temporary file until the summary, which precedes them, is complete.

Invariant: no character of a record is in the page except in base64, and the page's policy (CSP)
only runs the script that was hashed here.
"""

from conversations.page.build import LIMIT, MAX_BYTES, Page, build
from conversations.page.html import listing, policy, waiting
from conversations.page.parent import parent_of

__all__ = ["LIMIT", "MAX_BYTES", "Page", "build", "listing", "parent_of", "policy", "waiting"]
