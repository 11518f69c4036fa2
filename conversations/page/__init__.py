"""A run as one HTML page that opens from disk: everything in one file, nothing fetched, nothing of a record ever markup.

    with build(open_run("out")) as page:
        page.write("out.html")

Theory of operation. Records stream through once. Each becomes a row of the summary (what the list, the filters and the plots need)
and a few lines of JSON in a block; blocks of neighbouring records are deflated together and stand in the page as base64, which the
browser inflates when one of them is opened. So the page is about as large as the compressed run, and memory stays flat: blocks wait in
a temporary file until the summary, which comes before them, is known.

Invariant: no character of a record stands in the page but in base64; the page's policy (CSP) lets run only the script that we hashed.
"""

from conversations.page.build import LIMIT, MAX_BYTES, Page, build
from conversations.page.html import listing, policy, waiting
from conversations.page.parent import parent_of

__all__ = ["LIMIT", "MAX_BYTES", "Page", "build", "listing", "parent_of", "policy", "waiting"]
