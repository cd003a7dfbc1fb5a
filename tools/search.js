// The order of what the search box finds: whole words before the beginnings of words, headings and titles before text.
// What Fuse finds beyond that, with letters wrong, comes last. build_site.py puts this into the page's script.
const wordsOf = (text) => text.toLowerCase().split(/[^a-z0-9_+-]+/).filter(Boolean);
const wordScore = (words, wanted, whole, begin) =>
  words.includes(wanted) ? whole : words.some((word) => word.startsWith(wanted)) ? begin : 0;
const entryScore = (entry, wanted) => {
  entry.words = entry.words || ["section", "title", "text"].map((key) => wordsOf(entry[key] || ""));
  const [section, title, text] = entry.words;
  const heading = wordScore(section, wanted, 8, 4) * (section[0] === wanted ? 1.5 : 1);
  const page = wordScore(title, wanted, entry.section ? 3 : 8, entry.section ? 1 : 4);
  return heading + page + wordScore(text, wanted, 1, 0.5);
};
const ranked = (query, limit) => {
  const wanted = wordsOf(query);
  const scored = index.map((entry) => {
    const scores = wanted.map((word) => entryScore(entry, word));
    return [scores.every((score) => score > 0) ? scores.reduce((a, b) => a + b, 0) : 0, entry];
  });
  const found = scored.filter(([score]) => score > 0).sort((a, b) => b[0] - a[0]).map(([, entry]) => entry);
  const near = fuse && found.length < limit ? fuse.search(query, { limit }).map((hit) => hit.item) : [];
  return [...new Set([...found, ...near])].slice(0, limit);
};
