"""One site's part in a federation: join, agree, exchange round by round, leave."""
