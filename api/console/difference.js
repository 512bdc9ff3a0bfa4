// @ts-check
// Differences of two texts, word by word.

const MAX_CELLS = 4_000_000; // of the table of common subsequences

/**
 * Return both texts as runs [text, isCommon]. The common words are a longest common subsequence.
 * Texts that are too long for it are compared from their beginnings and their ends.
 */
export function compareWords(one, other) {
  const [a, b] = [split(one), split(other)];
  let start = 0;
  while (start < a.length && start < b.length && same(a[start], b[start])) start += 1;
  let end = 0;
  const rest = Math.min(a.length, b.length) - start;
  while (end < rest && same(a[a.length - 1 - end], b[b.length - 1 - end])) end += 1;
  const kept = [new Set(), new Set()];
  const middle = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  for (const [i, j] of commonWords(...middle)) {
    kept[0].add(start + i);
    kept[1].add(start + j);
  }
  return [a, b].map((words, side) =>
    runs(words, (i) => i < start || i >= words.length - end || kept[side].has(i)),
  );
}

/** Words with the white space before them. In a script without spaces every character is one. */
const split = (text) => text.match(WORDS) ?? [];
const UNSPACED = "\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Thai}\\p{Script=Lao}\\p{Script=Khmer}";
const WORDS = new RegExp(`\\s*(?:[${UNSPACED}]|[^\\s${UNSPACED}]+)|\\s+$`, "gu");
const same = (word, other) => word.trim() === other.trim();

/** The pairs of positions of a longest common subsequence. */
function commonWords(a, b) {
  if (a.length * b.length > MAX_CELLS) return [];
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1)
    for (let j = b.length - 1; j >= 0; j -= 1)
      lengths[i][j] = same(a[i], b[j])
        ? lengths[i + 1][j + 1] + 1
        : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const pairs = [];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (same(a[i], b[j])) pairs.push([i++, j++]);
    else if (lengths[i + 1][j] >= lengths[i][j + 1]) i += 1;
    else j += 1;
  }
  return pairs;
}

function runs(words, isCommon) {
  const found = [];
  words.forEach((word, i) => {
    const common = isCommon(i);
    if (found.length && found[found.length - 1][1] === common) found[found.length - 1][0] += word;
    else found.push([word, common]);
  });
  return found;
}
