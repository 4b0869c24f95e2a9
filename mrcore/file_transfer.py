"""The former place of `mrcore.transfer.file_transfer`; `import mrcore` has all that users need."""

from mrcore.transfer.file_transfer import FileTransfer as FileTransfer
