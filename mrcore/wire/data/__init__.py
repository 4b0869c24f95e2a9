"""Bulk bytes: `mr-data/1`, beside RPyC on the same port (RPyC itself moves bytes at 1–2 % of TLS's speed).

Requests are JSON frames `[u32 length] + object`, answered in order by one JSON frame (`{"error": …}` ends the
connection) and then by content. Content is pieces `[u8 kind][u32 bytes][u32 crc32] + bytes`, at most `piece_bytes`
each: kind 0 more follows, 1 the last of this content, 2 a fault instead of it (bytes: an error as JSON), which ends the
answer. The crc32 runs over the content from the first byte sent up to this piece's end, so every piece is verified
before it is handed on.

GET  {"get": [request, …]}            → {"get": how many}, then each request's content, in order, without round trips
PUT  {"put": request, "length": n}    → {"offset": k}: what the server has already (a resumed transfer), else 0
     the content from byte k on       → {"result": …} once it is flushed to disk and the finish callback has run
The crc32 of a PUT begins with the first k bytes as either side has them: if they differ, the next PUT begins at 0.
Without progress for `stall_seconds` either side gives up; an idle connection ends after `idle_data_seconds`.
"""

from mrcore.wire.data.client import DataClient
from mrcore.wire.data.pieces import Range, Relay, Upload, checksum
from mrcore.wire.data.server import DataHandler

__all__ = ["DataClient", "DataHandler", "Range", "Relay", "Upload", "checksum"]
