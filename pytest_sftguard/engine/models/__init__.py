"""The targets that come with the plugin: `tiny` trains where no other is named, `sums` also answers questions."""
