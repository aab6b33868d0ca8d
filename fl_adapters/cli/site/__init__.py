"""The site daemon: runs the jobs that include its site, and asks people at the site where its policy says so."""
