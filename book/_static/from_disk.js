/* A page opened from disk may not read other pages, so search lists titles without excerpts there. */
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
