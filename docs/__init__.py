"""The site: pages in Markdown, what is generated for it, and how it is built (`make docs`)."""
