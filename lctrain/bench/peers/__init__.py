"""Other libraries' sequence-parallel attention beside ours. All of them are optional installs."""
