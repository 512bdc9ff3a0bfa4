// Where the subject stands in a sentence: what makes a prompt with {} of plain words.

/** {prompt} with one {}, or {problem} that says what to change. A true object at the end of the sentence is left off. */
export function subjectOf({ prompt, subject, target_true: old = "" }) {
  let text = prompt.trimEnd();
  if (old && text.endsWith(` ${old}`)) text = text.slice(0, -old.length).trimEnd();
  if (old && text.endsWith(` ${old}.`)) text = text.slice(0, -old.length - 1).trimEnd();
  const marks = text.split("{}").length - 1;
  if (marks === 1)
    return subject ? { prompt: text } : { problem: "Name the subject that stands where {} is." };
  if (marks > 1) return { problem: "The sentence has several {}: leave the one where the subject stands." };
  if (!subject)
    return { problem: "Name the subject: select its words in the sentence and mark them, or type them." };
  const times = text.split(subject).length - 1;
  if (times === 1) return { prompt: text.replace(subject, () => "{}") };
  return times === 0
    ? {
        problem: `“${subject}” does not stand in the sentence: write it there as it is, or put {} in its place.`,
      }
    : { problem: `“${subject}” stands in the sentence ${times} times: put {} where the fact is about it.` };
}
